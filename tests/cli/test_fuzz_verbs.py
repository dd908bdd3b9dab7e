"""Fuzz tests of the command line: a verb starts work on a file's rows, or ends with a one-line error and code 2.

For input files the work itself is replaced. For strange files in a model's folder, texts are generated. `-m slow`
tries two thousand files of each kind.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import shutil
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import strategies as some

from hf_earlyexit import EarlyExitConfig, EarlyExitT5Config, EarlyExitT5ForConditionalGeneration
from hf_earlyexit.cli.main import main
from hf_earlyexit.common.seen_inputs import FILE as SEEN
from hf_earlyexit.common.seen_inputs import IN_CONFIG
from hf_earlyexit.families.shipped import CHECKPOINT, load_default
from hf_earlyexit.generation.certificate import FILE as CERTIFICATE
from tests.certificates import certificate_for
from tests.common.strange_files import (
    CONTENTS,
    FEW,
    LINES,
    MANY,
    NAMES,
    ROWS_OF_TEXTS,
    SUFFIXES,
    TABLES,
    VALUES,
    try_many,
)
from tests.tiny import tiny_config


class WorkError(Exception):
    """Raised where work would begin, after input was accepted. Not treated as a user's error."""


def begin(*args, **kwargs):
    raise WorkError


# Functions where verbs begin work after reading a file, and their replacements.
WORK = {
    "cli.generate.load": begin,
    "cli.evaluate.load": begin,
    "cli.calibrate.load": begin,
    "cli.speed.load_model": lambda arguments: load_default()[0],
    "speed.timed_walk.measure_roofline": begin,
    "speed.time_model.measure_time_model": begin,
    "speed.tuning.tune": begin,
}
READING = {
    "generate": "generate --input-file FILE",
    "generate, field": "generate --input-field text --input-file FILE",
    "evaluate": "evaluate --output OUT --file FILE",
    "evaluate, groups": "evaluate --output OUT --group-by id --part explore select calibrate report --file FILE",
    "calibrate": "calibrate --target 0.5 --output-dir OUT --file FILE",
    "verify-certificate": "verify-certificate --source-column text --target-column text --file FILE",
    "roofline": "roofline --exits FILE",
    "tune": "tune --exits FILE",
    "tune, times": "tune --time-model FILE",
    "report": "report --html OUT FILE",
}


def outcome(argv: list[str]) -> int | None:
    """The exit code of a call; None if its work would begin. Code 2 requires a one-line error and empty stdout."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(argv)
        except WorkError:
            return None
    said = err.getvalue()
    assert code in (0, 2) and "Traceback" not in said
    if code == 2:
        assert out.getvalue() == "" and said.splitlines()[-1].startswith("hf-earlyexit: error: ")
    return code


def argv_of(verb: str, file: Path, folder: Path) -> list[str]:
    places = {"FILE": str(file), "OUT": str(folder / "out")}
    return [places.get(word, word) for word in READING[verb].split()]


def any_file(folder: Path, content: bytes, suffix: str) -> None:
    file = folder / f"file{suffix}"
    file.write_bytes(content)
    with ExitStack() as stack:
        for name, work in WORK.items():
            stack.enter_context(mock.patch(f"hf_earlyexit.{name}", work))
        for verb in READING:
            outcome(argv_of(verb, file, folder))
    assert file.read_bytes() == content


# --- proper files ---------------------------------------------------------------------------------------------------


def read_by(verb: str, reader: str, file: Path, folder: Path) -> list:
    """What `reader`, called by the verb, has returned by the time work would begin."""
    module, name = reader.rsplit(".", 1)
    module = importlib.import_module(f"hf_earlyexit.{module}")
    found, read = [], getattr(module, name)

    def keep(*args, **kwargs):
        found.extend(read(*args, **kwargs))
        return found

    with mock.patch.object(module, name, keep), mock.patch.object(module, "load", begin):
        assert outcome(argv_of(verb, file, folder)) is None
    return found


def table(folder: Path, rows: list[list[str]], quoting: int, ends: str, suffix: str) -> None:
    """Check that cells of a table reach the verbs unchanged."""
    file, delimiter = folder / f"rows{suffix}", "\t" if suffix == ".tsv" else ","
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter, quoting=quoting, lineterminator=ends).writerows([["text", "ref"], *rows])
    file.write_bytes(stream.getvalue().encode())
    records = read_by("generate, field", "cli.generate.read_records", file, folder)
    assert records == [{"input": text, "ref": reference} for text, reference in rows]
    check_examples(rows, file, folder)


def json_lines(folder: Path, rows: list[list[str]], ensure_ascii: bool) -> None:
    file = folder / "rows.jsonl"
    lines = [json.dumps({"text": text, "ref": reference}, ensure_ascii=ensure_ascii) for text, reference in rows]
    file.write_bytes("\n".join(lines).encode())
    records = read_by("generate, field", "cli.generate.read_records", file, folder)
    assert records == [{"input": text, "ref": reference} for text, reference in rows]
    check_examples(rows, file, folder)


def check_examples(rows: list[list[str]], file: Path, folder: Path) -> None:
    """Check that `verify-certificate`, with `text` as input and reference column, reads every row once."""
    texts = sorted(text for text, _ in rows)
    if not all(text.strip() for text in texts) or len({*texts}) < len(texts):
        assert outcome(argv_of("verify-certificate", file, folder)) == 2  # an empty cell or a repeated input
        return
    examples = read_by("verify-certificate", "cli.calibrate.read_examples", file, folder)
    assert sorted(one.source for one in examples) == texts
    assert all(one.references == (one.source,) for one in examples)


def lines(folder: Path, lines: list[str], ends: str) -> None:
    file = folder / "lines.txt"
    file.write_bytes(ends.join(lines).encode())
    found = read_by("generate", "cli.generate.read_records", file, folder)
    assert found == [{"input": line} for line in lines]


# --- files of a model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """Folder of a tiny model with the shipped tokenizer, a certificate, and a list of seen inputs."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    shape = {"vocab_size": 8000, "d_model": 8, "d_ff": 8, "num_layers": 1, "num_decoder_layers": 2}
    config = EarlyExitT5Config(**tiny_config("tied", **shape).to_dict(), early_exit=EarlyExitConfig((1,)).to_dict())
    model = EarlyExitT5ForConditionalGeneration(config)
    model.record_seen("training", ["some input"])
    setting = {"exit_criterion": "softmax", "exit_threshold": 0.5}
    model.eval().certify(certificate_for(model, setting, max_new_tokens=2))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, folder)
    (folder / "inputs").write_text("describe: name[A]\n", encoding="utf-8")
    assert generated(folder) == 0
    return folder


def generated(folder: Path) -> int | None:
    argv = f"generate --input-file {folder}/inputs --model {folder} --max-new-tokens 2".split()
    return outcome(argv)


OF_MODELS = (
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *(CERTIFICATE, SEEN),
)
ENTRIES = some.dictionaries(
    some.sampled_from(
        ("format", "by", "training", "early_exit", "exit_threshold", "exit_criterion", "d_model", IN_CONFIG)
    )
    | NAMES,
    VALUES,
    max_size=3,
)


def strange_file_of_a_model(folder: Path, name: str, content: bytes | dict) -> None:
    """Replace a model's file by random bytes or by its JSON with changed entries, generate, and restore the file."""
    file = folder / name
    before = file.read_bytes()
    if isinstance(content, dict):
        content = json.dumps(json.loads(before) | content).encode() if name.endswith(".json") else before[:-1]
    file.write_bytes(content)
    try:
        generated(folder)
        assert file.read_bytes() == content
    finally:
        file.write_bytes(before)


# --- the tests ------------------------------------------------------------------------------------------------------


TRIALS = {
    "any file": (any_file, {"content": CONTENTS, "suffix": SUFFIXES}),
    "tables": (
        table,
        TABLES,
    ),
    "JSON lines": (
        json_lines,
        {
            "rows": ROWS_OF_TEXTS,
            "ensure_ascii": some.booleans(),
        },
    ),
    "text": (lines, {"lines": some.lists(LINES, min_size=1), "ends": some.sampled_from(("\n", "\r\n", "\n\n"))}),
}
COUNTS = [FEW, pytest.param(MANY, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", TRIALS)
def test_verbs_take_files_as_they_are_or_refuse_them_in_one_line(name, count, tmp_path):
    try_many(*TRIALS[name], tmp_path, count)


@pytest.mark.parametrize("count", COUNTS)
def test_strange_files_of_a_model_are_refused_in_one_line(count, model_folder):
    drawn = {"name": some.sampled_from(OF_MODELS), "content": CONTENTS | ENTRIES}
    try_many(strange_file_of_a_model, drawn, model_folder, count)


def test_a_verb_that_lets_an_error_through_is_noticed(tmp_path):
    def read(path):
        raise KeyError(path)

    with mock.patch("hf_earlyexit.cli.generate.read_file", read), pytest.raises(KeyError):
        any_file(tmp_path, b"text\n1\n", ".csv")
