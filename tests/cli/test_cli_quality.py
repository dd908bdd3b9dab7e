"""The verbs about quality, run on the shipped model: certificate, evaluation results and report."""

from __future__ import annotations

import csv
import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_earlyexit import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.cli import calibrate as cli_calibrate
from hf_earlyexit.cli.arguments import curves_of
from hf_earlyexit.cli.main import main
from hf_earlyexit.common.data import short_hash
from hf_earlyexit.common.partition import Partition
from hf_earlyexit.families.shipped import CHECKPOINT, default_examples, load_default
from hf_earlyexit.generation.certificate import FILE, Certificate
from hf_earlyexit.reports.card_sections import WORTH, write_section
from tests.cli.command_line import errors_of
from tests.evaluation.shortly import time_shortly
from tests.scripts import run_script


pytest.importorskip("scipy.stats")
QUICK = ["--max-new-tokens", "6"]
MAX_INPUTS = "40"
PROMISE = ["--target", "0.9", "--curve", "softmax:1,2", "0.0", "0.9", "--cost", "layers"]


def write_rows(path: Path, examples, references: int = 2) -> Path:
    """Write a CSV like E2E NLG's: a row per reference, inputs without their prefix."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mr", "ref"])
        for one in examples:
            writer.writerows([[one.source.removeprefix("describe: "), text] for text in one.references[:references]])
    return path


def in_random_order(count: int):
    """The examples that verbs read with `--max-inputs`."""
    return Partition().in_order(default_examples(), count)


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    """Folder of the shipped model, calibrated by the verb on 40 of its inputs."""
    folder = tmp_path_factory.mktemp("quality") / "certified"
    flags = ["--max-inputs", MAX_INPUTS, "--output-dir", str(folder), "--losses", str(folder.parent / "losses.csv")]
    assert main(["calibrate", *PROMISE, *QUICK, *flags]) == 0
    return folder


def test_calibrate_saves_a_checkpoint_that_leaves_as_certified(certified, capsys):
    certificate = Certificate.load(certified / FILE)
    assert certificate.certified and certificate.target == 0.9
    assert certificate.n == len(Partition().split(in_random_order(40))["calibrate"]) and certificate.attempts == 0
    assert certificate.data["name"] == "e2e-validation.csv.gz"
    assert (certified / "model.safetensors").read_bytes() == (CHECKPOINT / "model.safetensors").read_bytes()
    model = EarlyExitT5ForConditionalGeneration.from_pretrained(certified).eval()
    assert model.dtype == torch.float32, "as certified, though the file has half precision"
    _, tokenizer = load_default()
    batch = tokenizer([default_examples()[50].source], return_tensors="pt")
    output = model.generate(**batch, strict_certificate=True, return_dict_in_generate=True)
    assert output.sequences.shape[1] <= 7 and set(output.layers_run.flatten().tolist()) <= {1, 2, 8}
    card, shipped = ((folder / "README.md").read_text() for folder in (certified, CHECKPOINT))
    assert card.startswith(shipped.rstrip()) and certificate.in_words() in card.removeprefix(shipped.rstrip())
    with open(certified.parent / "losses.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + certificate.n and rows[0][1:] == [row["name"] for row in certificate.table]


def test_calibrate_says_what_it_found_and_goes_on_from_its_journal(certified, capsys, monkeypatch):
    kind = EarlyExitT5ForConditionalGeneration
    monkeypatch.setattr(kind, "generate", lambda *args, **kwargs: pytest.fail("something was generated again"))
    assert main(["calibrate", *PROMISE, *QUICK, "--max-inputs", MAX_INPUTS, "--output-dir", str(certified)]) == 0
    text = capsys.readouterr().out
    certificate = Certificate.load(certified / FILE)
    assert " ".join(certificate.in_words().split()) in " ".join(text.split())
    assert all(row["name"] in text and f"{row['upper_bound']:.4f}" in text for row in certificate.table)


def test_calibrate_takes_along_what_a_checkpoint_is_made_of(certified, tmp_path):
    """Files left by training, some of them pickled, are not copied; the card's earlier promise is replaced."""
    source, out = shutil.copytree(certified, tmp_path / "source"), tmp_path / "out"
    (source / "checkpoint-5").mkdir()
    left = (
        "checkpoint-5/model.safetensors",
        "training_args.bin",
        "trainer_state.json",
        "optimizer.pt",
        "rng_state_0.pth",
    )
    for name in (*left, "merges.txt"):
        (source / name).write_text("")
    write_section(source / "README.md", WORTH, "Of an earlier certificate.")
    certificate = replace(Certificate.load(certified / FILE), target=0.8)
    model = EarlyExitT5ForConditionalGeneration.from_pretrained(source)
    cli_calibrate.save(model, None, certificate, Namespace(model=str(source), output_dir=str(out)))
    assert {path.name for path in out.iterdir()} == {path.name for path in certified.iterdir()} | {"merges.txt"}
    assert Certificate.load(out / FILE) == certificate
    card = (out / "README.md").read_text()
    assert card.count("## What is promised") == 1 and certificate.in_words() in card and "Of an earlier" not in card


def test_verify_certificate_tries_new_inputs(certified, tmp_path, capsys):
    file = write_rows(tmp_path / "new.csv", in_random_order(60)[20:])
    flags = ["--model", str(certified), "--file", str(file), "--group-by", "mr", "--prefix", "describe: "]
    assert main(["verify-certificate", *flags]) == 0
    text = " ".join(capsys.readouterr().out.split())
    seen = Certificate.load(certified / FILE).split["hashes"]
    known = {*seen["explore"], *seen["select"], *seen["calibrate"]}
    left_out = sum(short_hash(one) in known for one in in_random_order(60)[20:])
    assert f"left out: {left_out} inputs" in text and f"on {40 - left_out} new units" in text and left_out > 0
    false = shutil.copytree(certified, tmp_path / "false")
    (false / FILE).write_text(json.dumps(json.loads((certified / FILE).read_text()) | {"target": 0.001}))
    assert main(["verify-certificate", "--model", str(false), *flags[2:]]) == 1
    assert "REFUTED" in capsys.readouterr().out


def test_evaluate_and_report(tmp_path, capsys, monkeypatch):
    time_shortly(monkeypatch)
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    output = tmp_path / "results.json"
    grid = ["--curve", "classifier", "0.7", "--batch-sizes", "2", "--batch-rules", "row", "--rounds", "2"]
    assert main(["evaluate", "--max-inputs", "4", *QUICK, *grid, "--output", str(output)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    files = {"output": str(output), "journal": f"{output}.journal"}
    assert json.loads(last) == {**files, "cells": 9, "inputs": 4} and Path(files["journal"]).is_file()
    assert any(line.startswith("classifier 0.7") for line in lines)
    assert "per token are: classifier " in " ".join(
        "\n".join(lines).partition("Oracle, a bound and no saving")[2].split()
    )
    results = json.loads(output.read_text())
    assert results["asked"]["parts"] == ["explore", "select"]
    assert results["asked"]["partition"] == Partition().described()
    assert results["asked"]["model"] == "t5-e2e" and results["asked"]["data"] == "e2e-validation.csv.gz"
    assert main(["report", str(output), "--png", str(tmp_path / "figures")]) == 0
    written = capsys.readouterr().out.split()
    assert written[0] == str(tmp_path / "results.html") and all(Path(path).is_file() for path in written)
    assert "classifier 0.7" in Path(written[0]).read_text() and len(written) > 3
    card = tmp_path / "README.md"
    card.write_text("# A model\n")
    assert main(["report", str(output), "--card", str(card)]) == 0
    assert (
        card.read_text().startswith("# A model\n\n## What early exit is worth\n")
        and "| classifier 0.7 |" in card.read_text()
    )
    assert capsys.readouterr().out.splitlines()[-1] == str(card)
    assert str(tmp_path / "figures/oracle.png") in written and list(results["oracle"]["curves"]) == ["classifier"]


def test_the_script_is_the_verb(tmp_path):
    ran = run_script("evaluate_exits.py", "--curve", "softmx", "0.5", "--output", "results.json", cwd=tmp_path)
    assert ran.returncode == 2 and "got 'softmx'" in ran.stderr and not list(tmp_path.iterdir())


def test_a_curve_that_is_named_twice_has_all_thresholds():
    curves = curves_of([["softmax", "0.9"], ["state", "0.5"], ["softmax", "0.5", "0.7"]])
    assert curves == {"softmax": (0.9, 0.5, 0.7), "state": (0.5,)} and curves_of(None) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate", "--target", "0.1", "--output-dir", "no/where"], "--output-dir: there is no folder"),
        (["calibrate", "--target", "0.1", "--output-dir", "rows.csv"], "--output-dir rows.csv is a file"),
        (
            ["calibrate", "--target", "0.1", "--output-dir", "x", "--losses", "no/l.csv"],
            "--losses: there is no folder",
        ),
        (["calibrate", "--target", "0.1", "--output-dir", "x", "--journal", "no/j"], "--journal: there is no folder"),
        (
            ["calibrate", "--target", "2", "--output-dir", "x"],
            "`target` must be a number above 0 and below 1.0, got 2.0",
        ),
        (["calibrate", "--target", "0.1", "--loss", "rouge", "--output-dir", "x"], "`loss` must be one of"),
        (["calibrate", "--target", "0.1", "--max-inputs", "20", "--output-dir", "x"], "25 are needed"),
        (["calibrate", "--target", "0.1", "--curve", "softmax", "often", "--output-dir", "x"], "--curve takes a name"),
        (["calibrate", "--target", "0.1", "--model", "x", "--output-dir", "x"], "--model needs --file"),
        (["calibrate", "--target", "0.1", "--prefix", "a", "--output-dir", "x"], "--prefix goes with --file"),
        (["calibrate", "--target", "0.1", "--file", "rows.csv", "--output-dir", "x"], "rows repeat an input"),
        (["calibrate", "--target", "0.1", "--file", "rows.txt", "--output-dir", "x"], "must end in one of"),
        (["calibrate", "--target", "0.1", "--batch-exit", "rows", "--output-dir", "x"], "`batch_exit` must be one of"),
        (
            ["calibrate", "--target", "0.1", "--exit-candidates", "9000", "--output-dir", "x"],
            "`exit_candidates=9000` is more than the vocabulary of this model, 8000",
        ),
        (["verify-certificate"], "has no certificate: make one with"),
        (["evaluate", "--output", "no/where.json"], "--output: there is no folder"),
        (["evaluate", "--output", "x", "--journal", "no/where"], "--journal: there is no folder"),
        (["evaluate", "--output", "."], "--output . is a folder"),
        (["evaluate", "--output", "x", "--max-inputs", "4"], "`batch_sizes` has 8, but there are 4 inputs"),
        (["evaluate", "--output", "x", "--part", "all"], "invalid choice: 'all'"),
        (["evaluate", "--output", "x", "--salt", ""], "`salt` must be a text that is not empty"),
        (["evaluate", "--output", "x", "--shares", "1", "1", "0", "0"], "`shares` must be numbers"),
        (["evaluate", "--output", "x", "--batch-rules", "rows"], "`batch_exit` must be one of"),
        (["evaluate", "--output", "x", "--device", "nonsense"], "--device nonsense cannot be used"),
        (["report", "rows.csv"], "rows.csv is not JSON"),
        (["report", "nowhere.json"], "nowhere.json: No such file"),
        (["report", "rows.csv", "--card", "README.md"], "--card README.md is no file"),
        (["report", "rows.csv", "--html", "no/where.html"], "--html: there is no folder"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.csv", default_examples()[:3])
    kind = EarlyExitT5ForConditionalGeneration
    monkeypatch.setattr(kind, "generate", lambda *args, **kwargs: pytest.fail("something was generated"))
    assert message in errors_of(arguments, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv"]
