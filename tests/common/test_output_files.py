"""Output files never overwrite inputs, and are written atomically."""

from __future__ import annotations

import os
import shutil

import pytest

from hf_earlyexit.cli.main import main
from hf_earlyexit.common.output_files import (
    folder_written_whole,
    refuse_folder_of_model,
    refuse_overwriting,
    write_text,
    written_beside,
)
from hf_earlyexit.families.shipped import CHECKPOINT
from tests.cli.command_line import errors_of


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """An input file in the current folder, and a folder with a model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("describe: name[A]\n")
    (tmp_path / "model" / "sub").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "results.json"):
        (tmp_path / "model" / name).write_text("{}")
    return tmp_path / "texts.txt"


def alias(kind: str, texts) -> str:
    """A different name of the file."""
    if kind == "symlink":
        os.symlink(texts, "other")
    elif kind == "hard link":
        os.link(texts, "other")
    elif kind == "folder link":
        os.symlink(".", "here")
    names = {
        "same": str(texts),
        "relative": "texts.txt",
        "roundabout": "model/../texts.txt",
        "folder link": "here/texts.txt",
    }
    return names.get(kind, "other")


@pytest.mark.parametrize("kind", ("same", "relative", "roundabout", "symlink", "hard link", "folder link"))
def test_an_output_is_no_input_under_any_name(texts, kind, capsys):
    name = alias(kind, texts)
    assert "would write over" in errors_of(["generate", "--input-file", str(texts), "--output-file", name], capsys)
    assert texts.read_text() == "describe: name[A]\n"


def test_an_output_is_not_what_is_piped_in(texts, monkeypatch):
    with open(texts) as stream:
        with pytest.raises(ValueError, match="--out texts.txt would write over standard input, which is read"):
            refuse_overwriting({"--out": "texts.txt"}, [stream.fileno()])
        refuse_overwriting(
            {"--out": "another.txt", "--journal": None}, [stream.fileno(), "google/flan-t5-small", None]
        )


def test_an_output_is_no_file_of_a_model(texts):
    for name in ("model/config.json", "model/model.safetensors", "model/sub/../config.json"):
        with pytest.raises(ValueError, match="would write over model/"):
            refuse_overwriting({"--output": name}, ["model"])
    refuse_overwriting({"--output": "model/results.json", "--journal": "model/results.json.journal"}, ["model"])
    shutil.copy("texts.txt", "out.txt.partial")
    with pytest.raises(ValueError, match=r"--output out\.txt would write over out\.txt\.partial"):
        refuse_overwriting({"--output": "out.txt"}, ["out.txt.partial"])


@pytest.mark.parametrize("names", (("a", "a"), ("a", "./a"), ("texts.txt", "model/../texts.txt")))
def test_two_outputs_are_two_files(texts, names):
    with pytest.raises(ValueError, match="--journal and --output are the same file"):
        refuse_overwriting(dict(zip(("--output", "--journal"), names, strict=True)), [])


@pytest.mark.parametrize("folder", ("model", "./model/", "model/sub", "model/new/deeper"))
def test_a_model_is_not_saved_over_the_one_that_is_read(texts, folder):
    with pytest.raises(ValueError, match="is, or is in, the folder of the model that is read"):
        refuse_folder_of_model("--output-dir", folder, [None, "google/flan-t5-small", "model"])
    for other in ("new", ".", "model2"):
        refuse_folder_of_model("--output-dir", other, ["model"])


def test_verbs_refuse_to_write_over_what_they_read(texts, tmp_path, capsys):
    """Refused before a model is loaded: the folder has none."""
    rows, model = str(tmp_path / "rows.csv"), str(tmp_path / "model")
    (tmp_path / "rows.csv").write_text("input,target\na,b\n")
    given = ["--model", model, "--file", rows]
    for arguments in (
        ["evaluate", *given, "--output", rows],
        ["evaluate", *given, "--output", "r.json", "--journal", rows],
        ["evaluate", *given, "--output", f"{model}/config.json"],
        ["verify-certificate", *given, "--journal", rows],
        ["calibrate", *given, "--target", "0.1", "--output-dir", "new", "--losses", rows],
        ["calibrate", *given, "--target", "0.1", "--output-dir", "new", "--journal", f"{model}/model.safetensors"],
        ["report", rows, "--html", rows],
        ["report", rows, "--card", rows],
        ["tune", model, "--exits", rows, "--json-out", rows],
        ["roofline", model, "--json-out", f"{model}/config.json"],
    ):
        assert "would write over" in errors_of(arguments, capsys), arguments
    line = errors_of(["calibrate", *given, "--target", "0.1", "--output-dir", f"{model}/certified"], capsys)
    assert "is in, the folder of the model" in line
    assert (tmp_path / "rows.csv").read_text() == "input,target\na,b\n"


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    path, link = tmp_path / "out.txt", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    with pytest.raises(RuntimeError), written_beside(link) as file:
        file.write("half")
        file.flush()
        raise RuntimeError
    assert (path.read_text(), (tmp_path / "out.txt.partial").read_text()) == ("old", "half")
    write_text(link, "a\r\nb\n")
    assert link.is_symlink() and path.read_bytes() == b"a\r\nb\n" and path.stat().st_mode & 0o777 == 0o640
    assert not (tmp_path / "out.txt.partial").exists()
    write_text(os.devnull, "gone")
    assert not os.path.isfile(os.devnull)


def test_a_folder_takes_its_place_when_it_is_whole(tmp_path):
    place = tmp_path / "out"
    beside = place / ".partial"
    (place / "sub").mkdir(parents=True)
    for name in ("config.json", "results.json", "sub/old"):
        (place / name).write_text("old")
    with pytest.raises(RuntimeError), folder_written_whole(place) as folder:
        (folder / "config.json").write_text("half")
        (folder / "stale").write_text("half")
        raise RuntimeError
    assert (place / "config.json").read_text() == "old" and beside.is_dir()
    with folder_written_whole(place) as folder:
        (folder / "sub").mkdir()
        for name in ("config.json", "sub/new"):
            (folder / name).write_text("new")
    found = {str(file.relative_to(place)): file.read_text() for file in place.rglob("*") if file.is_file()}
    assert found == {"config.json": "new", "results.json": "old", "sub/old": "old", "sub/new": "new"}
    assert not beside.exists()
    with folder_written_whole(tmp_path / "an/other") as folder:
        (folder / "config.json").write_text("new")
    assert [*(tmp_path / "an/other").iterdir()] == [tmp_path / "an/other/config.json"]


def test_a_certificate_never_lies_beside_other_weights(tmp_path, monkeypatch):
    """At every moment of moving files; weights of an earlier model are removed, since loading could prefer them."""
    place, moments = tmp_path / "place", []
    place.mkdir()
    for name in ("exit_certificate.json", "model.safetensors", "config.json", "results.json"):
        (place / name).write_text("old")
    replace = os.replace

    def watched(one, other):
        replace(one, other)
        found = {file.name: file.read_text() for file in place.iterdir() if file.is_file()}
        moments.append(found)

    monkeypatch.setattr(os, "replace", watched)
    with folder_written_whole(place) as folder:
        for name in ("exit_certificate.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors", "config.json"):
            (folder / name).write_text("new")
    assert len(moments) == 4
    assert all("exit_certificate.json" not in found for found in moments[:-1])
    assert moments[-1] == {
        "exit_certificate.json": "new",
        "model-1-of-2.safetensors": "new",
        "model-2-of-2.safetensors": "new",
        "config.json": "new",
        "results.json": "old",
    }


def test_a_run_that_was_cut_off_leaves_the_old_output(texts, monkeypatch, capsys):
    monkeypatch.setattr("hf_earlyexit.cli.generate.Tally.summary", lambda self: "done")
    monkeypatch.setattr("hf_earlyexit.cli.generate.load", lambda arguments: (_Model(), None))
    monkeypatch.setattr("hf_earlyexit.cli.generate.generate_batch", lambda *_: interrupted())
    texts.with_name("out.jsonl").write_text("old")
    arguments = ["generate", "--model", str(CHECKPOINT), "--input-file", "texts.txt", "--output-file", "out.jsonl"]
    assert main(arguments) == 130
    assert texts.with_name("out.jsonl").read_text() == "old" and "Traceback" not in capsys.readouterr().err


class _Model:
    """The model attributes that are read before anything is generated."""

    exit_certificate = None
    hf_quantizer = None
    device = dtype = type("Nothing", (), {"type": "other"})
    config = type("Config", (), {"num_decoder_layers": 2})


def interrupted():
    raise KeyboardInterrupt
