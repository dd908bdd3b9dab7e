"""No entry point that chooses a setting or trains reads inputs reserved for tests, unless it is given their part.

This holds for all entry points that read inputs. Reads are observed where texts are tokenised or generated for, and
where recorded exits are walked; the work itself is not done.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Seq2SeqTrainer, T5ForConditionalGeneration

from hf_earlyexit.calibration.accuracy_fit import fit_exit_accuracy
from hf_earlyexit.cli import speed as cli_speed
from hf_earlyexit.cli.main import build_parser, main
from hf_earlyexit.common.data import Example
from hf_earlyexit.common.partition import OPEN, PARTS, Partition
from hf_earlyexit.common.seen_inputs import SeenInputs
from hf_earlyexit.evaluation.generate_texts import TextGenerator
from hf_earlyexit.evaluation.grid import Grid
from hf_earlyexit.evaluation.model_evaluation import evaluate_model
from hf_earlyexit.families.shipped import CHECKPOINT, default_examples, default_exits, load_default
from hf_earlyexit.training import shortcuts
from tests.common.test_data import write
from tests.parts import drawn
from tests.scripts import SCRIPTS, run_script
from tests.tiny import tiny_config


pytest.importorskip("scipy.stats")
INPUTS = drawn(default_examples(), explore=3, select=3, calibrate=4, report=2)
CALIBRATE = next(one.source for one in INPUTS if Partition().part_of(one.source) == "calibrate")
PART_OF = {one.source: Partition().part_of(one.source) for one in INPUTS}


class Stopped(Exception):
    """Raised in place of generating, training or timing."""


def stop(*args, **kwargs):
    raise Stopped


@contextmanager
def watched():
    """Collect the sources that are read inside the context; `Stopped` is raised where work would begin."""
    seen: set[str] = set()
    encode = PreTrainedTokenizerBase.__call__

    def note(texts) -> None:
        seen.update(one for one in ([texts] if isinstance(texts, str) else texts or []) if one in PART_OF)

    def encode_and_note(self, text=None, *args, **kwargs):
        note(text)
        return encode(self, text, *args, **kwargs)

    def write_and_note(self, examples, *args):
        note([one.source for one in examples])
        raise Stopped

    def walk_and_note(arguments, recorded, model):
        note([INPUTS[len(layers) - 1].source for layers in recorded.layers_run])
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "__call__", encode_and_note)
        patch.setattr(TextGenerator, "write", write_and_note)
        patch.setattr(cli_speed, "exits_to_walk", walk_and_note)
        patch.setattr(Seq2SeqTrainer, "train", stop)
        patch.setattr(shortcuts, "fit_shortcuts", lambda *args, **kwargs: None)
        patch.setattr(shortcuts, "measure_shortcuts", stop)
        yield seen


def files(folder: Path) -> Path:
    """Write validation inputs, training inputs that repeat them plus one more, recorded exits, and a plain model."""
    rows = [{"text": one.source, "summary": one.references[0]} for one in INPUTS]
    write(folder / "validation.csv", rows)
    write(folder / "train.csv", [*rows, {"text": "describe: something else", "summary": "something else"}])
    records = [{"input": one.source, "layers_run": [8] * place} for place, one in enumerate(INPUTS, 1)]
    (folder / "exits.jsonl").write_text("\n".join(map(json.dumps, records)))
    torch.manual_seed(0)
    config = tiny_config(vocab_size=8000, eos_token_id=1, pad_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder / "plain")
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(folder / "plain")
    return folder


def evaluation_in_python(folder: Path, *told: str) -> None:
    asked = {"parts": told} if told else {}
    evaluate_model(*load_default(), INPUTS, Grid({"state": [0.9]}, batch_sizes=[1], rounds=2), **asked)


def accuracy_of_exits(folder: Path, *told: str) -> None:
    fit_exit_accuracy(*load_default(), INPUTS, **({"parts": told} if told else {}))


def verb_evaluate(folder: Path, *told: str) -> None:
    asked = ["--part", *told] if told else []
    data = ["--model", str(CHECKPOINT), "--file", str(folder / "validation.csv"), "--batch-sizes", "1"]
    main(["evaluate", *data, *asked, "--output", str(folder / "results.json")])


def verb_tune(folder: Path, *told: str) -> None:
    asked = ["--part", *told] if told else []
    main(["tune", "--exits", str(folder / "exits.jsonl"), "--criterion", "softmax", *asked])


def script(name: str, *options: str) -> Callable[..., None]:
    def run(folder: Path, *told: str) -> None:
        asked = ["--validation_parts", *told] if told else []
        given = ["--train_file", "train.csv", "--validation_file", "validation.csv", "--output_dir", "out"]
        ran = run_script(name, *given, *options, *asked, cwd=folder)
        pytest.fail(f"{name} was not stopped: {ran.stderr}")

    run.__name__ = name
    return run


SHAPE = "--vocab_size 60 --encoder_layers 1 --decoder_layers 1 --d_model 8 --d_ff 8 --num_heads 1"
ENTRIES = (
    evaluation_in_python,
    accuracy_of_exits,
    verb_evaluate,
    verb_tune,
    script("train_exits.py", "--model", "plain", "--exit_layers", "2", "--report_to", "none", "--use_cpu"),
    script("fit_shortcuts.py", "--model", "plain", "--exit_layers", "2"),
    script("pretrain_t5.py", *SHAPE.split(), "--report_to", "none", "--use_cpu"),
    script("compare_recipes.py", "--model", "plain", "--exit_layers", "2", "4", "--recipes", "shallow-deep"),
)


def reads_what_may_be_looked_at(entry, folder: Path) -> None:
    with watched() as seen, pytest.raises(Stopped):
        entry(folder)
    assert {PART_OF[source] for source in seen} == {*OPEN}


def reads_what_it_is_told(entry, folder: Path) -> None:
    with watched() as seen, pytest.raises(Stopped):
        entry(folder, "report")
    assert {PART_OF[source] for source in seen} == {"report"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return files(tmp_path_factory.mktemp("looked"))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
def test_what_a_promise_will_be_tested_on_is_not_read(entry, folder):
    reads_what_may_be_looked_at(entry, folder)


@pytest.mark.parametrize("entry", ENTRIES[1:5], ids=lambda entry: entry.__name__)
def test_other_parts_are_read_when_told(entry, folder):
    reads_what_it_is_told(entry, folder)


def tuned_on(monkeypatch, *arguments: str) -> list[list[int]]:
    """The recorded layers that `tune` reads with these arguments."""
    found = []

    def walk(arguments, recorded, model):
        found.extend(recorded.layers_run)
        raise Stopped

    monkeypatch.setattr(cli_speed, "exits_to_walk", walk)
    with pytest.raises(Stopped):
        main(["tune", *arguments])
    return found


@pytest.mark.parametrize("told", ((), ("report",)))
def test_of_the_exits_that_ship_those_are_read_that_may_be(told, monkeypatch):
    shipped = default_exits()
    parts = [Partition().part_of(text) for text in shipped["inputs"]]
    expected = [row for row, part in zip(shipped["layers_run"], parts, strict=True) if part in (told or OPEN)]
    assert 0 < len(expected) < parts.count("calibrate")
    assert tuned_on(monkeypatch, *(["--part", *told] if told else [])) == expected


def recorded_in(path: Path, **fields) -> list[str]:
    """Write recorded exits of inputs without their prefix, text `n` with `n` tokens; return `tune`'s arguments."""
    texts = [one.source.removeprefix("describe: ") for one in INPUTS]
    lines = [{"input": text, "layers_run": [8] * place, **fields} for place, text in enumerate(texts, 1)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return ["--exits", str(path), "--criterion", "softmax"]


def test_records_say_what_was_put_before_their_inputs(tmp_path, monkeypatch):
    expected = [place for place, one in enumerate(INPUTS, 1) if PART_OF[one.source] in OPEN]
    for arguments in (
        recorded_in(tmp_path / "said.jsonl", input_prefix="describe: "),
        [*recorded_in(tmp_path / "told.jsonl"), "--prefix", "describe: "],
    ):
        assert [*map(len, tuned_on(monkeypatch, *arguments))] == expected
    said = recorded_in(tmp_path / "said.jsonl", input_prefix="describe: ")
    assert main(["tune", *said, "--prefix", "summarize: "]) == 2


def test_a_prefix_is_not_put_before_inputs_that_have_it(tmp_path, capsys):
    """It would draw other parts: the shipped exits, and records that do not say their prefix."""
    assert main(["tune", "--prefix", "describe: "]) == main(["tune", "--group-by", "id"]) == 2
    file = tmp_path / "recorded.jsonl"
    recorded_in(file)
    records = map(json.loads, file.read_text().splitlines())
    lines = [json.dumps(one | {"input": f"describe: {one['input']}"}) for one in records]
    file.write_text("\n".join(lines))
    assert main(["tune", "--exits", str(file), "--prefix", "describe: "]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "--prefix goes with --exits" in errors[0] and "--group-by goes with --exits" in errors[1]
    assert "inputs of --exits begin with it already" in errors[2]


def test_records_are_read_with_their_group(tmp_path, monkeypatch, capsys):
    group = next(name for name in map(str, range(99)) if Partition().part_of(f"describe: {name}") == "select")
    other = next(name for name in map(str, range(99)) if Partition().part_of(f"describe: {name}") == "calibrate")
    all_in_one = recorded_in(tmp_path / "one.jsonl", input_prefix="describe: ", topic=group)
    assert len(tuned_on(monkeypatch, *all_in_one, "--group-by", "topic")) == len(INPUTS)
    kept = recorded_in(tmp_path / "kept.jsonl", input_prefix="describe: ", topic=other)
    assert main(["tune", *kept, "--group-by", "topic"]) == main(["tune", *kept, "--group-by", "id"]) == 2
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert "all of inputs in other parts" in first and "--group-by id: a record of --exits has no such" in second


def read_texts(**options):
    """`read_texts` of the training scripts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        from text_pairs import DataArguments, read_texts

        return read_texts(DataArguments(**options))


def test_training_rows_of_a_group_that_is_kept_for_tests_are_left_out(tmp_path):
    """Other inputs of the group are in training; the group and the inputs are recorded as seen."""
    names = {part: next(name for name in map(str, range(99)) if Partition().part_of(name) == part) for part in PARTS}
    (tmp_path / "train.csv").write_text("text,target,topic\n" + "".join(f"new {p},x,{n}\n" for p, n in names.items()))
    (tmp_path / "validation.csv").write_text(
        "text,target,topic\n" + "".join(f"old {p},x,{n}\n" for p, n in names.items())
    )
    given = {"train_file": str(tmp_path / "train.csv"), "validation_file": str(tmp_path / "validation.csv")}
    given |= {"source_column": "text", "target_column": "target"}
    texts = read_texts(**given, group_by="topic")
    assert [source for source, _ in texts.train] == [f"new {part}" for part in OPEN] and texts.left_out == 2
    assert len(read_texts(**given).train) == 4, "without groups nothing shows that they belong together"
    seen = SeenInputs().plus("training", texts.sources)
    with pytest.raises(ValueError, match="1 by training, of 1"):
        seen.refuse([Example("another input", (), names["select"])], "the test")
    seen.refuse([Example("another input", (), names["calibrate"])], "the test")
    (tmp_path / "train.csv").write_text("text,target\nnew,x\n")
    with pytest.raises(ValueError, match="--group_by topic: the training rows have no such column"):
        read_texts(**given, group_by="topic")


def test_training_rows_that_are_kept_for_tests_are_left_out_and_counted(folder, capsys):
    given = {"train_file": str(folder / "train.csv"), "validation_file": str(folder / "validation.csv")}
    texts = read_texts(**given)
    assert texts.left_out == 6 and len(texts.train) == 7 and len(texts.validation) == 6
    assert {PART_OF.get(source, "select") for source in texts.sources} == {*OPEN}
    assert (
        "6 of 13 training rows are left out: their inputs or groups are in validation outside"
        in capsys.readouterr().err
    )
    assert read_texts(**given, validation_parts=list(PARTS)).left_out == 0 and not capsys.readouterr().err
    assert len(read_texts(**given, max_validation_inputs=2).validation) == 2
    with pytest.raises(ValueError, match="All training inputs are validation inputs of parts that are not read"):
        kept = write(folder / "kept.csv", [{"text": CALIBRATE, "summary": "a"}])
        read_texts(**given | {"train_file": kept})
    with pytest.raises(ValueError, match="--shares must be 4 numbers"):
        read_texts(**given, shares=[0.5, 0.5])
    with pytest.raises(ValueError, match="`parts` must name some of"):
        read_texts(**given, validation_parts=["test"])


def test_groups_stay_together(tmp_path):
    """An input is read only together with its whole group."""
    rows = [{"text": f"input {number}", "summary": "a", "topic": f"topic {number // 3}"} for number in range(60)]
    write(tmp_path / "validation.csv", rows)
    write(tmp_path / "train.csv", [{"text": "other", "summary": "a", "topic": "x"}])
    files = {name: str(tmp_path / f"{name.removesuffix('_file')}.csv") for name in ("train_file", "validation_file")}
    read = read_texts(**files, group_by="topic").validation
    assert read and all(sum(one.unit == other.unit for other in read) == 3 for one in read)


def test_no_entry_point_is_missing():
    """All verbs and scripts that read inputs are covered, except verbs that test or choose nothing.

    `calibrate` and `verify-certificate` test; `roofline` chooses nothing.
    """
    verbs = next(one.choices for one in build_parser()._actions if one.choices)
    reading = {name for name, one in verbs.items() if {"--file", "--exits"} & {*one._option_string_actions}}
    assert reading == {"evaluate", "tune", "calibrate", "verify-certificate", "roofline"}
    scripts = {path.name for path in SCRIPTS.glob("*.py") if "from text_pairs import" in path.read_text()}
    assert scripts == {entry.__name__ for entry in ENTRIES if entry.__name__.endswith(".py")}


def keeps_everything(monkeypatch) -> None:
    monkeypatch.setattr(Partition, "keep", lambda self, examples, parts=OPEN: self.in_order(examples))


def calls_every_part_open(monkeypatch) -> None:
    monkeypatch.setattr(Partition, "part_of", lambda self, unit: "select")


def keeps_the_last_ones(monkeypatch) -> None:
    """Keep as many examples as the open parts have, but the last ones."""
    monkeypatch.setattr(Partition, "keep", lambda self, examples, parts=OPEN: list(examples)[-6:])


@pytest.mark.once
@pytest.mark.parametrize(
    "mutation, entry",
    [
        (keeps_everything, evaluation_in_python),
        (keeps_everything, accuracy_of_exits),
        (keeps_the_last_ones, verb_evaluate),
        (calls_every_part_open, verb_tune),
        (keeps_everything, ENTRIES[4]),
    ],
    ids=lambda one: one.__name__,
)
def test_the_law_notices(mutation, entry, folder, monkeypatch):
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        reads_what_may_be_looked_at(entry, folder)
