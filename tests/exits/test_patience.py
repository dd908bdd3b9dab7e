"""Patience: by hand, against a slow reference, and with deliberate errors in its streaks."""

from __future__ import annotations

import pytest
import torch

from hf_earlyexit import ExitPoint
from hf_earlyexit.decoding import run
from hf_earlyexit.evaluation.forced import AskExits
from hf_earlyexit.exits import criteria
from hf_earlyexit.exits.criteria import CRITERIA, Shortlist
from hf_earlyexit.exits.patience import Patience, Streaks
from tests import laws
from tests.laws.test_mutations import swapped
from tests.shortlists import length_of_the_last_run
from tests.tiny import NUM_LAYERS, VOCABULARY, tiny_inputs, tiny_pair


def point(layer: int, rows: list[int], choices: list[int], streaks, vocabulary: int = 4, shortlist=None) -> ExitPoint:
    """An exit point at which `choices` are the rows' best tokens; the other tokens rank by ascending id."""
    logits = 2 * torch.nn.functional.one_hot(torch.tensor(choices), vocabulary) - 0.1 * torch.arange(vocabulary)
    score_some = lambda layer, hidden, ids: logits.gather(1, ids)  # noqa: E731
    hidden = torch.zeros(len(rows), 3)
    positions = [5] * len(rows)
    return ExitPoint(
        layer, rows, positions, hidden, hidden, lambda *_: logits, None, score_some, shortlist, streaks=streaks
    )


# --- by hand --------------------------------------------------------------------------------------------------------


def test_streaks_by_hand():
    """Row 4 chooses token 1 throughout, row 7 only in between; row 2 changes its choice and exits."""
    streaks, found = Streaks(), []
    for layer, rows, choices in (
        (1, [2, 4, 7], [3, 1, 0]),
        (3, [2, 4, 7], [2, 1, 1]),
        (4, [4, 7], [1, 1]),
        (6, [4, 7], [1, 0]),
    ):
        found.append(Patience().confidence(point(layer, rows, choices, streaks)).tolist())
    assert found == [[0, 0, 0], [0, 1 / 2, 0], [2 / 3, 1 / 2], [3 / 4, 0]]


def test_nothing_is_counted_twice_and_nothing_without_being_looked_at():
    streaks = Streaks()
    first, second = point(1, [0], [2], streaks), point(2, [0], [2], streaks)
    for _ in range(3):
        assert Patience().confidence(first).tolist() == [0] and Patience().confidence(second).tolist() == [1 / 2]
    assert point(3, [0], [2], streaks).logits is not None
    assert Patience().confidence(point(4, [0], [2], streaks)).tolist() == [2 / 3]


def test_patience_over_patience_plus_1_is_met_exactly():
    """Thresholds are met exactly in fp64; in fp32, 9/10 is below 0.9, and patience 9 would act as 10."""
    for asked in range(1, 100):
        streaks = Streaks()
        for layer in range(1, asked + 2):
            confidence = Patience().confidence(point(layer, [0], [1], streaks)).tolist()[0]
            assert (confidence >= asked / (asked + 1)) == (layer == asked + 1)


def test_among_candidates():
    """Choices are compared as token ids, not as indices among candidates, and separately by number of candidates."""
    streaks, shortlist = Streaks(), Shortlist()
    criterion = Patience(candidates=2)
    expected = [0, 1 / 2, 0, 1 / 2]
    for layer, choice in enumerate((3, 3, 0, 0), start=1):
        seen = point(layer, [0], [choice], streaks, shortlist=shortlist)
        assert criterion.confidence(seen).tolist() == [expected[layer - 1]]
        assert Patience().confidence(seen).tolist() == [expected[layer - 1]]
    assert shortlist.of([0], 2).tolist() == [[0, 3]]


def test_under_teacher_forcing_every_exit_point_counts():
    _, model = tiny_pair("untied", 2)
    inputs = tiny_inputs(4)
    asked = AskExits({"patience": Patience(), "max_prob": CRITERIA["max_prob"]()})
    with torch.no_grad():
        found = model(**inputs, labels=inputs["input_ids"], exit_objective=asked).loss
        labels, states = inputs["input_ids"].flatten(), []
        model(**inputs, labels=inputs["input_ids"], exit_objective=lambda exits: states.append(exits) or labels[0])
        choices = torch.stack([states[0].logits(layer).argmax(-1) for layer in range(1, NUM_LAYERS)]).T.tolist()
    for layer in range(1, NUM_LAYERS):
        runs = [length_of_the_last_run(said[:layer]) for said in choices]
        expected = torch.tensor([1 - 1 / length for length in runs], dtype=torch.float64)
        torch.testing.assert_close(found.confidences["patience"][:, layer - 1], expected)
    assert len(found.confidences["patience"][:, 4].unique()) >= 3
    some = found.asked_at((1, 4, 5)).confidences
    runs = [length_of_the_last_run([said[0], said[3], said[4]]) for said in choices]
    assert some["patience"][:, 2].tolist() == pytest.approx([1 - 1 / length for length in runs])
    assert torch.equal(some["max_prob"], found.confidences["max_prob"][:, [0, 3, 4]])
    assert not torch.equal(some["patience"][:, 2], found.confidences["patience"][:, 4])


# --- the law --------------------------------------------------------------------------------------------------------


def follows_the_slow_reference(threshold: float = 0.5, **kwargs):
    """Compare with the reference, with the whole vocabulary as candidates, which must equal no candidates."""
    depths = set()
    for seed in (0, 1, 2):
        stock, model = tiny_pair.shared("untied", seed)
        settings = {"criterion": "patience", "threshold": threshold, "seed": seed} | kwargs
        output, _ = laws.candidates_follow_frozen_rows(
            stock, model, tiny_inputs(4, seed), count=VOCABULARY, **settings
        )
        plain = laws.generate(
            model, tiny_inputs(4, seed), seed, exit_criterion="patience", exit_threshold=threshold, **kwargs
        )
        assert torch.equal(plain.sequences, output.sequences) and torch.equal(plain.layers_run, output.layers_run)
        if not kwargs.get("batch_exit"):
            laws.assert_not_vacuous(output)
        depths |= set(output.layers_run.flatten().tolist())
    return depths - {0}


def test_two_in_a_row_follow_the_slow_reference():
    assert follows_the_slow_reference() == {2, 3, 4, 5, 6}


def test_two_in_a_row_of_some_exit_points():
    assert follows_the_slow_reference(exit_layers=[1, 3, 4]) == {3, 4, 6}


def test_three_in_a_row_in_whole_batches():
    for rule in ("batch", "batch_joint"):
        assert min(follows_the_slow_reference(2 / 3, batch_exit=rule)) < 6, "some have left"


# --- mistakes -------------------------------------------------------------------------------------------------------


@swapped(Streaks, "_of")
def takes_another_rows_streak(of):
    return lambda self, rows, candidates: tuple(part.roll(1, 0) for part in of(self, rows, candidates))


@swapped(Streaks, "_of")
def keeps_the_first_rows_streaks(of):
    """Looks up the streaks of continuing rows by their index among them instead of by batch row."""

    def mutant(self, rows, candidates):
        return tuple(part[: len(rows)] for part in of(self, self._last[candidates][0], candidates))

    return mutant


@swapped(run.ExitRun, "begin_step")
def keeps_the_streaks_of_the_step_before(begin_step):
    def mutant(self, length):
        kept, live = getattr(self, "streaks", None), begin_step(self, length)
        if kept is not None and all(set(live) <= set(known) for known, *_ in kept._last.values()):
            self.streaks = kept
        return live

    return mutant


@swapped(Streaks, "go_on")
def never_starts_again(go_on):
    return lambda self, rows, choices, candidates=None: go_on(self, rows, torch.zeros_like(choices), candidates)


@swapped(criteria.ExitPoint, "first_choices")
def looks_at_the_second_choice(first_choices):
    return lambda self, candidates=None: self.logits.topk(2).indices[:, 1]


@pytest.mark.parametrize(
    "mutate",
    [
        takes_another_rows_streak,
        keeps_the_first_rows_streaks,
        keeps_the_streaks_of_the_step_before,
        never_starts_again,
        looks_at_the_second_choice,
    ],
    ids=lambda one: one.__name__,
)
def test_mutation_breaks_the_law(monkeypatch, mutate):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        follows_the_slow_reference()
