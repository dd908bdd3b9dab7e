"""The verbs `roofline` and `tune`: their output, files, and refusals before any work."""

from __future__ import annotations

import json

import pytest
import torch

from hf_earlyexit.cli.main import main
from hf_earlyexit.families.shipped import CHECKPOINT
from tests.cli.command_line import errors_of
from tests.speed.test_tuning import FREE


EXITS = str(CHECKPOINT / "exits.json")
QUICK = ["--rounds", "1", "--new-tokens", "24", "--source", "5"]
SHAPE = ["--layers", "3", "--d-model", "64", "--d-ff", "96", "--vocabulary", "50"]


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setattr("hf_earlyexit.speed.machine_rates.LARGE", 2**21)


@pytest.fixture
def verb(capsys, tmp_path):
    """A function that runs a verb and returns its stdout and its JSON file."""

    def run(*arguments) -> tuple[str, dict]:
        path = tmp_path / "out.json"
        assert main([*map(str, arguments), "--json-out", str(path)]) == 0
        return capsys.readouterr().out, json.loads(path.read_text(encoding="utf-8"))

    return run


def first_column(text: str, head: str) -> list[str]:
    """First column of the table whose header contains `head`."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if head in line)
    table = lines[start + 1 :]
    return [line.split("  ")[0] for line in table[: table.index("")]]


PARTS = ["layers", "cross-attention", "source projection", "catch-up", "heads", "loop and decisions"]


def test_roofline_of_the_shipped_model_with_recorded_exits(verb):
    text, found = verb("roofline", "--exits", EXITS, "--batch", 2, *QUICK)
    assert first_column(text, "ideal ms") == [*PARTS, "all"]
    assert [part["name"] for part in found["parts"]] == PARTS
    assert f"The largest loss is in {found['largest_loss']}: " in text
    losses = {part["name"]: part["measured"] - part["ideal"] for part in found["parts"]}
    assert found["largest_loss"] == max(losses, key=losses.get)
    assert found["criterion"] == "softmax" and found["exit_layers"] == [2, 4, 6]
    assert f"{found['mean_layers']:.2f} of 8 layers" in text
    assert found["parts"][3]["bytes"] > 0, "no debt was paid"
    assert found["batch"] == 2 and found["threads"] == 1


def test_roofline_of_a_shape(verb):
    """Exits after layer 1 of 3 do a third of full depth's layer work, and no backfill."""
    _, full = verb("roofline", *SHAPE, *QUICK)
    text, one = verb("roofline", *SHAPE, *QUICK, "--depth", 1)
    assert full["mean_layers"] == 3 and one["mean_layers"] == 1 and "1.00 of 3 layers" in text
    assert full["parts"][0]["flops"] == pytest.approx(3 * one["parts"][0]["flops"])
    assert full["parts"][4]["flops"] == one["parts"][4]["flops"] == 2 * 64 * 50
    assert full["parts"][3]["bytes"] == one["parts"][3]["bytes"] == 0
    _, asked = verb("roofline", *SHAPE, *QUICK, "--depth", 2, "--criterion", "classifier", "--prepared")
    assert asked["criterion"] == "classifier" and asked["prepared"]


def test_threads_are_as_before_afterwards(verb):
    before = torch.get_num_threads()
    _, found = verb("roofline", *SHAPE, *QUICK, "--threads", 2)
    assert found["rates"]["threads"] == 2 and torch.get_num_threads() == before


def tuned(tmp_path, **changes) -> str:
    path = tmp_path / "time_model.json"
    model = FREE.to_dict() | changes
    path.write_text(json.dumps({"time_model": model}), encoding="utf-8")
    return str(path)


def test_tune_names_the_best_set(verb, tmp_path):
    text, found = verb("tune", "--time-model", tuned(tmp_path))
    assert found["best"] == [2, 4, 6] and "Ask at --exit-layers 2 4 6: " in text
    assert f"{found['ranking'][0]['ratio']:.2f} of full depth's time" in text
    assert first_column(text, "ms/token")[:2] == ["none: full depth", "2 4 6"]
    assert len(found["ranking"]) == 7 and "so measure what you choose" in " ".join(text.split())


def test_tune_says_that_it_does_not_pay(verb, tmp_path):
    text, found = verb("tune", "--time-model", tuned(tmp_path, question=[9.0, 72.0]))
    assert found["best"] is None and "Early exit does not pay here" in text


def test_tune_measures_and_reads_what_it_has_written(verb, tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"layers_run": [1, 8, 3]}\n{"layers_run": [8, 2]}\n', encoding="utf-8")
    chosen = ["tune", "--exits", path, "--exit-layers", 1, 2, 3, "--criterion", "state"]
    _, found = verb(*chosen, "--batch", 2, *QUICK)
    assert found["time_model"]["rows"] == [1, 2] and found["time_model"]["criterion"] == "state"
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps(found), encoding="utf-8")
    _, again = verb(*chosen, "--batch", 2, "--time-model", kept)
    assert again["ranking"] == found["ranking"]
    assert again["source"] == found["source"] != 64, "how it was measured is taken over"
    arguments = [*chosen, "--batch", 4, "--time-model", kept]
    assert main([*map(str, arguments)]) == 2
    assert "--batch 4" in capsys.readouterr().err and found["time_model"]["rows"][-1] == 2


def test_what_does_not_go_together_is_refused(capsys, tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"layers_run": [1, 3]}\n{"layers_run": [2]}\n', encoding="utf-8")
    for arguments, message in (
        (["roofline", "--exits", EXITS, "--depth", "2"], "--depth does not go with --exits"),
        (["roofline", "--exit-layers", "2"], "it needs --exits"),
        (["roofline", "some-model", "--layers", "3"], "does not go with a model"),
        (["roofline", "--d-model", "100"], "--d-model 100 must be a multiple of 64"),
        (["roofline", "--criterion", "fixed"], "--criterion must be one of"),
        (["roofline", "--json-out", "no/such/folder/f.json"], "--json-out"),
        (["roofline", *SHAPE, "--depth", "4"], "--depth 4: this model's exit points are [1, 2, 3]"),
        (["roofline", *SHAPE, "--exits", EXITS], "a decoder of 8 layers, this one has 3"),
        (["roofline", *SHAPE, "--exits", str(lines), "--exit-layers", "1", "2", "7"], "--exit-layers has [7]"),
        (["roofline", *SHAPE, "--exits", str(lines), "--exit-layers", "1"], "tokens that left after [2]"),
        (["tune", "some-model"], "--exits is needed"),
        (["tune", "--exits", str(lines)], "--criterion is needed"),
        (["tune", "--time-model", EXITS], "has no `time_model`"),
        (["tune", "--criterion", "state", "--time-model", tuned(tmp_path)], "is of softmax, not of state"),
        (["roofline", "--exits", "no-such-file"], "no-such-file"),
    ):
        assert message in errors_of(arguments, capsys)
