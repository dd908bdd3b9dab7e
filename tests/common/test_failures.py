"""Errors that the user can fix give one line and exit code 2 in every verb; an interrupt gives 130, no traceback."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from hf_earlyexit.calibration.risk_target import refuse_degenerate
from hf_earlyexit.cli.generate import read_records
from hf_earlyexit.cli.main import main
from hf_earlyexit.common.failures import one_line
from hf_earlyexit.common.tokenizer import check_tokenizer, load_tokenizer
from hf_earlyexit.evaluation.generate_texts import Text
from hf_earlyexit.families.shipped import CHECKPOINT
from tests.cli.command_line import errors_of


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tiny plain T5 with the vocabulary size of the shipped tokenizer, which is copied beside it."""
    folder = tmp_path_factory.mktemp("small")
    shape = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 2}
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(vocab_size=8000, decoder_start_token_id=0, **shape)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, folder)
    (folder / "in.txt").write_text("describe: name[A]\n")
    return folder


def broken(small, tmp_path, name: str, content: bytes | str | None):
    """A copy of the folder with one file replaced or removed."""
    folder = shutil.copytree(small, tmp_path / "broken")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    (
        ("model.safetensors", b"\x10\x00"),
        ("model.safetensors", b""),
        ("model.safetensors", None),
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"model_type": "bert"}'),
        ("config.json", '{"model_type": "t5", "d_model": "wide"}'),
        ("generation_config.json", "{"),
        ("generation_config.json", "[]"),
        ("generation_config.json", '{"num_return_sequences": 2, "num_beams": 2}'),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", None),
        ("tokenizer_config.json", "\x00"),
    ),
)
def test_broken_files_of_a_model_are_named_in_one_line(small, tmp_path, capsys, name, content):
    folder = broken(small, tmp_path, name, content)
    arguments = ["--model", str(folder), "--input-file", str(folder / "in.txt"), "--max-new-tokens", "1"]
    assert str(folder) in errors_of(["generate", *arguments], capsys)


def test_debug_shows_the_traceback_before_or_behind_the_verb(capsys):
    for arguments in (["--debug", "report", "no.json"], ["report", "no.json", "--debug"]):
        assert main(arguments) == 2
        *trace, line = capsys.readouterr().err.splitlines()
        assert any("Traceback" in one for one in trace) and line.startswith("hf-earlyexit: error: no.json: No such")
    assert "No such file" in errors_of(["report", "no.json"], capsys)


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("hf_earlyexit.cli.main.environment", lambda: {}["fault"])
    with pytest.raises(KeyError, match="fault"):
        main(["env"])


def test_memory_that_is_too_small_can_be_put_right(monkeypatch, capsys):
    def fail():
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr("hf_earlyexit.cli.main.environment", fail)
    assert "out of memory: take smaller batches" in errors_of(["env"], capsys)


@pytest.mark.parametrize(
    "content",
    ("[]", "{", '{"format": 1}', '{"time_model": {}}', '{"time_model": []}', '{"layers_run": 3, "setting": []}', "1"),
)
def test_files_of_our_own_that_are_broken(tmp_path, capsys, small, content):
    path = tmp_path / "file.json"
    path.write_text(content)
    assert str(path) in errors_of(["report", str(path)], capsys)
    assert str(path) in errors_of(["tune", str(small), "--exits", str(path)], capsys)
    line = errors_of(["tune", "--time-model", str(path), "--batch", "1"], capsys)
    assert str(path) in line


def test_results_of_an_evaluation_that_lack_something(tmp_path, capsys):
    path = tmp_path / "results.json"
    names = ("asked", "environment", "num_layers", "inputs", "cells")
    quality = {"full": {"curve": "full depth", "scores": {}}}
    path.write_text(json.dumps({"format": 1, "quality": quality, **dict.fromkeys(names, [])}))
    assert f"{path} is not as `hf-earlyexit evaluate` writes it" in errors_of(["report", str(path)], capsys)


def test_arguments_that_are_no_text(capsys):
    line = errors_of(["generate", "--input-file", "x", "--prefix", "\udcff"], capsys)
    assert "--prefix: '\\udcff' is not UTF-8" in line


def test_errors_are_one_line():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert one_line(FileNotFoundError(2, "No such file", "a\nb")) == "a b: No such file"
    assert len(one_line(ValueError("a" * 10_000))) < 2100


def test_an_interrupt_is_code_130(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_earlyexit.cli.main.environment", interrupt)
    assert main(["env"]) == 130
    assert capsys.readouterr() == ("", "")


# If the tests run in the background, SIGINT may be ignored, and child processes inherit that.
HEEDING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
STARTED = HEEDING + "import sys; from hf_earlyexit.cli.main import main; print(flush=True); sys.exit(main())"


def test_an_interrupt_of_the_program_is_code_130_without_a_traceback(tmp_path):
    """The interrupt arrives while library code waits for input."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", STARTED, "generate", "--input-file", "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in said


# --- tokenizers -----------------------------------------------------------------------------------------------------


def test_a_tokenizer_belongs_to_its_model(small, tmp_path):
    config = T5Config.from_pretrained(small)
    tokenizer = load_tokenizer(small, config)
    assert len(tokenizer) == 8000
    for changes, message in (
        ({"vocab_size": 60}, "the tokenizer has 8000 tokens, the model 60"),
        ({"vocab_size": 7999}, "the tokenizer has 8000 tokens, the model 7999"),
        ({"vocab_size": 32128}, "the tokenizer has 8000 tokens, the model 32128"),
        ({"pad_token_id": 5}, "`pad_token_id` of the tokenizer is 0, of the model 5"),
        ({"eos_token_id": 2}, "`eos_token_id` of the tokenizer is 1, of the model 2"),
        ({"eos_token_id": [2, 3]}, "`eos_token_id` of the tokenizer is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            check_tokenizer(tokenizer, argparse.Namespace(**{**config.to_dict(), **changes}), "m")
    for changes in ({"vocab_size": 8128}, {"eos_token_id": [1, 2]}, {"eos_token_id": None}):
        check_tokenizer(tokenizer, argparse.Namespace(**{**config.to_dict(), **changes}), "m")


def test_a_model_without_a_tokenizer_is_refused(small, tmp_path):
    """Transformers would build a tokenizer with an empty vocabulary."""
    for names in (("tokenizer.json", "tokenizer_config.json"), ("tokenizer.json",)):
        folder = shutil.copytree(small, tmp_path / names[-1])
        for name in names:
            (folder / name).unlink()
        with pytest.raises(ValueError, match="tokenizer"):
            load_tokenizer(folder, T5Config.from_pretrained(small))


@pytest.mark.parametrize(
    ("texts", "found"),
    ((["", " "], "nothing"), ([""], "nothing"), (["a", "a "], "'a'"), (["a", "b"], None), (["a"], None)),
)
def test_nothing_is_promised_of_texts_that_say_nothing(texts, found):
    written = [Text(text, [], []) for text in texts]
    if found is None:
        refuse_degenerate(written)
        return
    with pytest.raises(ValueError, match=f"the model writes {found} for each of {len(texts)} inputs"):
        refuse_degenerate(written)


def test_standard_input_may_be_any_bytes(monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n\xe9\n"), errors="surrogateescape"))
    with pytest.raises(ValueError, match="stdin, line 2: byte 0xe9 is not UTF-8"):
        read_records("-", None)
