"""Losses of candidates by unit, and their times relative to stock, against hand-computed values."""

from __future__ import annotations

import csv
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_earlyexit.calibration.loss_table import LossTable, record_losses, times_beside_stock
from hf_earlyexit.calibration.losses import LOSSES
from hf_earlyexit.common.data import Example
from hf_earlyexit.decoding.candidates import Candidate, curve_candidates, full_depth
from hf_earlyexit.evaluation.generate_texts import Generations, Text
from hf_earlyexit.speed import timing


EAGER, EAGEREST = curve_candidates("softmax", [0.5, 0.2])
MISMATCH = LOSSES["token_mismatch"]
# For each input: the group, and the number of wrong tokens, of four, of each of the two candidates.
WRONG = {"a": ("x", 0, 2), "b": ("", 1, 1), "c": ("x", 1, 4), "d": ("", 0, 3), "e": ("", 4, 4)}
EXAMPLES = [Example(source, ("reference",), group) for source, (group, *_) in WRONG.items()]


class ScriptedWriter:
    """Returns texts according to `WRONG`. Wrong tokens run 1 layer, others 10 x the candidate's threshold."""

    def __init__(self):
        self.asked = []

    def write(self, examples, candidate: Candidate, part: str) -> Generations:
        self.asked.append((candidate.name, part, len(examples)))
        return Generations([self._text(example.source, candidate) for example in examples], {})

    def _text(self, source: str, candidate: Candidate) -> Text:
        if candidate == full_depth():
            return Text("", [1, 2, 3, 4], [8] * 4)
        wrong = WRONG[source][1 if candidate is EAGER else 2]
        depth = round(10 * candidate.threshold)
        return Text("", [0] * wrong + [1, 2, 3, 4][wrong:], [1] * wrong + [depth] * (4 - wrong))


def table(examples=EXAMPLES, candidates=(EAGER, EAGEREST), rows=None, loss=MISMATCH) -> LossTable:
    return record_losses(ScriptedWriter(), examples, candidates, loss, "select", rows)


def test_losses_are_of_each_unit():
    """The first and the third input form one unit."""
    found = table()
    assert found.units == ["x", "b", "d", "e"] and found.names == ["softmax 0.5", "softmax 0.2"]
    np.testing.assert_allclose(found.losses[:, 0], [(0 + 1) / 8, 1 / 4, 0, 1])
    np.testing.assert_allclose(found.losses[:, 1], [(2 + 4) / 8, 1 / 4, 3 / 4, 1])
    np.testing.assert_allclose(found.layers, [(6 * 1 + 14 * 5) / 20, (14 * 1 + 6 * 2) / 20])


def test_units_stand_where_they_first_appear():
    assert table(EXAMPLES[::-1]).units == ["e", "d", "x", "b"]
    np.testing.assert_allclose(table(EXAMPLES[::-1]).losses, table().losses[[3, 2, 0, 1]])


def test_rows_that_wait_for_each_other_are_one_unit():
    """The input after the last whole batch is left out, because its batch would have another size."""
    found = table(rows=2)
    assert found.units == ["batch 0", "batch 1"]
    np.testing.assert_allclose(found.losses, [[1 / 8, 3 / 8], [1 / 8, 7 / 8]])
    np.testing.assert_allclose(found.layers, [(2 * 1 + 14 * 5) / 16, (10 * 1 + 6 * 2) / 16])
    with pytest.raises(ValueError, match="The select part has too few inputs: at least one batch of 6"):
        table(rows=6)
    with pytest.raises(ValueError, match="The select part has too few inputs: at least one must"):
        table([])


def test_full_depth_is_written_first_and_everyone_once():
    writer = ScriptedWriter()
    record_losses(writer, EXAMPLES, [EAGER, EAGEREST], MISMATCH, "report")
    assert writer.asked == [(name, "report", 5) for name in ("full depth", "softmax 0.5", "softmax 0.2")]


def test_the_loss_is_told_early_from_full_and_gets_the_inputs_references():
    seen = []
    loss = SimpleNamespace(of=lambda early, full, references: seen.append((early, full, references)) or 0.5)
    found = table([Example("a", ("one",)), Example("b", ("two", "three"))], [EAGEREST], loss=loss)
    tokens = [(early.tokens, full.tokens, references) for early, full, references in seen]
    whole = [1, 2, 3, 4]
    assert tokens == [([0, 0, 3, 4], whole, ("one",)), ([0, 2, 3, 4], whole, ("two", "three"))]
    assert found.losses.tolist() == [[0.5], [0.5]]


def test_columns_and_curves():
    other = Candidate("state", 0.5, {})
    found = table(candidates=(EAGER, other, EAGEREST))
    np.testing.assert_array_equal(found.column(EAGEREST), found.losses[:, 2])
    curve = found.of_curve("softmax")
    assert curve.candidates == [EAGER, EAGEREST] and curve.units == found.units
    np.testing.assert_array_equal(curve.losses, found.losses[:, [0, 2]])
    np.testing.assert_array_equal(curve.layers, found.layers[[0, 2]])
    assert found.of_curve("state").names == ["state 0.5"]


def test_a_table_is_saved_as_csv(tmp_path):
    some = [Example('name["The, É"]\nnear'), Example("b")]
    WRONG[some[0].source] = ("", 1, 3)
    try:
        table(some).save(tmp_path / "losses.csv")
    finally:
        del WRONG[some[0].source]
    with open(tmp_path / "losses.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["unit", "softmax 0.5", "softmax 0.2"],
        ['name["The, É"]\nnear', "0.25", "0.75"],
        ["b", "0.25", "0.25"],
    ]


# Times


class Clocked:
    """Models whose calls take scripted times on simulated clocks; the first call of each is slow."""

    def __init__(self, monkeypatch, device: str = "cpu"):
        self.now, self.calls, self.threads = {"cpu": 0.0, "wall": 0.0}, [], set()
        for clock in self.now:
            monkeypatch.setitem(timing.CLOCKS, clock, lambda clock=clock: self.now[clock])
        config = SimpleNamespace(num_decoder_layers=6, num_layers=6)
        self.stock = SimpleNamespace(generate=self._generate, config=config)
        self.model = SimpleNamespace(generate=self._generate, device=torch.device(device))

    def batches(self, examples, size):
        for start in range(0, len(examples), size):
            yield {"input_ids": "".join(example.source for example in examples[start : start + size])}

    def _generate(self, input_ids, **keywords):
        name = str(keywords.get("exit_threshold", "full depth" if keywords else "stock"))
        warm = name in {called for called, _ in self.calls}
        self.calls.append((name, input_ids))
        self.threads.add(torch.get_num_threads())
        seconds = seconds_of(name, input_ids) if warm else 1000.0
        self.now["cpu"] += seconds
        self.now["wall"] += seconds**2


def seconds_of(name: str, batch: str) -> float:
    """Scripted seconds of a call; the ratios between candidates depend on the batch."""
    place = sum(map(ord, batch)) % 7 + 1
    return {"stock": 3.0, "full depth": 3.6, "0.5": 2.0 + place / 10, "0.2": 1.5 / place}[name] * place


def times(clocked: Clocked, sources: str = "abcdefghij", size: int = 2, rounds: int = 5) -> list[float]:
    some = [Example(source) for source in sources]
    everyone = [full_depth(), EAGER, EAGEREST]
    return times_beside_stock(clocked, clocked.stock, some, everyone, batch_size=size, rounds=rounds)


def rounds_of(clocked: Clocked) -> list[list[tuple[str, str]]]:
    return [clocked.calls[start : start + 4] for start in range(0, len(clocked.calls), 4)]


@pytest.mark.parametrize(("device", "power"), (("cpu", 1), ("cuda", 2)))
def test_times_are_medians_of_ratios_on_the_devices_clock(device, power, monkeypatch):
    found = times(Clocked(monkeypatch, device))
    batches = ("ab", "cd", "ef", "gh", "ij")
    ratio = lambda name, batch: (seconds_of(name, batch) / seconds_of("stock", batch)) ** power  # noqa: E731
    expected = [median(ratio(name, batch) for batch in batches) for name in ("full depth", "0.5", "0.2")]
    assert found == pytest.approx(expected) and found[0] == pytest.approx(1.2**power)
    assert len({ratio("0.5", batch) for batch in batches}) == 5, "the median is of different ones"


def test_everyone_takes_turns_on_each_batch_after_one_that_warms_up(monkeypatch):
    clocked = Clocked(monkeypatch)
    times(clocked)
    names = {"stock", "full depth", "0.5", "0.2"}
    assert all({name for name, _ in one} == names for one in rounds_of(clocked))
    assert [{batch for _, batch in one} for one in rounds_of(clocked)] == [
        {one} for one in ("ab", "cd", "ef", "gh", "ij", "ab")
    ]
    assert len({tuple(name for name, _ in one) for one in rounds_of(clocked)}) > 1, "nobody is always first"


@pytest.mark.parametrize(
    ("sources", "expected"), (("abcde", "ab cd ab cd ab"), ("abcdefghijkl", "ab cd ef gh ij"), ("a", "a a a a a"))
)
def test_whole_batches_go_round_until_there_are_enough(sources, expected, monkeypatch):
    clocked = Clocked(monkeypatch)
    times(clocked, sources, rounds=4)
    assert [one[0][1] for one in rounds_of(clocked)] == expected.split()


def test_times_are_taken_on_one_thread(monkeypatch):
    before, clocked = torch.get_num_threads(), Clocked(monkeypatch)
    torch.set_num_threads(2)
    try:
        times(clocked, rounds=2)
        assert clocked.threads == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
