"""Criteria compared to the oracle: by hand, against all possible choices, and on teacher-forced texts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from hf_earlyexit import ClassifierConfig, EarlyExitConfig
from hf_earlyexit.decoding.candidates import curve_candidates
from hf_earlyexit.evaluation import oracle_curves
from hf_earlyexit.evaluation.forced import AskExits, ForcedTokens, force, join
from hf_earlyexit.evaluation.generate_texts import Text
from hf_earlyexit.evaluation.oracle import first_agreeing
from hf_earlyexit.evaluation.oracle_curves import (
    OraclePoint,
    cheapest,
    criterion_points,
    oracle_layers,
    oracle_values,
    same_layer_points,
    swept_thresholds,
)
from hf_earlyexit.exits.criteria import CRITERIA, SoftmaxResponse, StateSimilarity
from tests.evaluation.test_oracle import AGREES, untidy
from tests.laws.test_mutations import swapped
from tests.tiny import NUM_LAYERS, tiny_inputs, tiny_pair, unrest


# --- lines ----------------------------------------------------------------------------------------------------------


def made(agrees=AGREES, confidences=None, layers=(2, 4, 6), num_layers=8) -> ForcedTokens:
    never = torch.zeros(len(agrees)).bool()
    return ForcedTokens(layers, num_layers, agrees.long(), agrees, confidences or {}, never, never)


def every_choice(agrees, layers, num_layers) -> dict[int, float]:
    """For every number of disagreeing tokens, the fewest mean layers over all ways to choose exits."""
    ends, least = [*layers, num_layers], {}
    for choice in product(range(len(ends)), repeat=len(agrees)):
        wrong = sum(place < len(layers) and not bool(agrees[row, place]) for row, place in enumerate(choice))
        mean = sum(ends[place] for place in choice) / len(agrees)
        least[wrong] = min(mean, least.get(wrong, num_layers))
    return {wrong: min(least[other] for other in least if other <= wrong) for wrong in least}


def is_the_cheapest_of_all_choices():
    generator = torch.Generator().manual_seed(0)
    for draw in range(6):
        agrees = torch.rand(6, 3, generator=generator) < 0.15 + 0.12 * draw
        points = oracle_curves.oracle_points(made(agrees))
        for wrong, mean in every_choice(agrees, (2, 4, 6), 8).items():
            assert oracle_layers(points, 1 - wrong / 6) == pytest.approx(mean)


def test_the_oracles_line_is_the_cheapest_of_all_choices():
    is_the_cheapest_of_all_choices()
    points = oracle_curves.oracle_points(made())
    assert points[0] == OraclePoint(pytest.approx((2 + 4 + 2 + 2 + 8 + 4) / 6), 1.0)
    assert [one.layers for one in points] == pytest.approx([22 / 6, 16 / 6, 16 / 6, 2.0])
    assert [one.agreement for one in points] == pytest.approx([1.0, 5 / 6, 5 / 6, 3 / 6])


def test_leaving_always_after_the_same_layer():
    points = same_layer_points(made())
    assert [(one.layers, one.agreement) for one in points] == [(2, 0.5), (4, 4 / 6), (6, 0.5), (8, 1)]


def a_criterion_by_hand():
    rows = [[0.9, 0, 0], [0.2, 0.5, 0], [0.5, 0.9, 0], [0, 0, 0.5], [0.1, 0.1, 0.1], [0.4, 0.9, 0]]
    confidences = torch.tensor(rows, dtype=torch.float64)
    own = made(confidences={"c": confidences})
    full, *points = criterion_points(own, "c", [0.5, 1.0, 0.0, 0.5])
    assert full == OraclePoint(8, 1) and points[0] == OraclePoint(8, 1, 1.0)
    assert points[1] == OraclePoint(pytest.approx((2 + 4 + 2 + 6 + 8 + 4) / 6), pytest.approx(5 / 6), 0.5)
    assert points[2] == OraclePoint(2, pytest.approx(0.5), 0.0) and len(points) == 3
    values = sorted(set(confidences.flatten().tolist()))
    # Each value passes its own threshold, midway to the value before.
    midway = [0.0, *((one + other) / 2 for one, other in pairwise(values))]
    assert swept_thresholds(own, "c", 2) == [midway[-1], 0.0] and len(swept_thresholds(own, "c")) <= 6
    assert swept_thresholds(own, "c", 50) == midway[::-1]
    assert cheapest([full, *points], 5 / 6) == points[1] and cheapest([full, *points], 0.9).layers == 8


def test_a_criterion_by_hand():
    a_criterion_by_hand()


def no_criterion_beats_the_oracle():
    """Holds at every threshold on tiny models; at its own point the oracle agrees for all tokens."""
    shown = 0
    for seed in (0, 1):
        classifier = ClassifierConfig(trained=True)
        config = EarlyExitConfig(exit_layers=(1, 2, 4, 5), classifier=classifier)
        _, model = tiny_pair("tied", seed, early_exit=config)
        own, *_ = forced_on(model, ("softmax", "max_prob", "entropy", "state", "classifier"), seed)
        bound = oracle_curves.oracle_points(own)
        for name in own.confidences:
            for one in criterion_points(own, name, swept_thresholds(own, name)):
                assert oracle_layers(bound, one.agreement) <= one.layers + 1e-9
                shown += one.agreement < 1 and oracle_layers(bound, one.agreement) < one.layers
        first = first_agreeing(own.agrees, own.layers, own.num_layers)
        assert bound[0].layers == pytest.approx(float(first.double().mean())) and bound[0].agreement == 1
    assert shown > 100


def test_no_criterion_beats_the_oracle():
    no_criterion_beats_the_oracle()


# --- forced texts ---------------------------------------------------------------------------------------------------


class Numbers:
    """A stand-in for `TextGenerator` whose inputs are the rows of a tiny batch."""

    def __init__(self, model, size: int, seed: int = 0):
        self.model, self.size, self.inputs = model, size, tiny_inputs(4, seed)

    def batches(self, examples):
        for start in range(0, len(examples), self.size):
            yield {name: tensor[start : start + self.size] for name, tensor in self.inputs.items()}


def forced_on(model, names, seed: int = 0, size: int = 3):
    """Texts of different lengths, teacher-forced on a model; also returns the ids and the texts."""
    ids = model.generate(**tiny_inputs(4, seed), max_new_tokens=8, early_exit=False, logits_processor=unrest(seed))
    texts = [Text("", row[: 5 + place], []) for place, row in enumerate(ids[:, 1:].tolist())]
    criteria = {name: CRITERIA[name]() for name in names}
    return force(Numbers(model, size, seed), range(4), texts, criteria), ids, texts


def test_confidences_are_those_that_generate_asks_of_the_first_token():
    """No K/V differ up to the first exit, so at the first token `generate` must have the same confidences."""
    _, model = untidy(1)
    own, _, texts = forced_on(model, ("softmax", "state"), 1)
    starts = np.cumsum([0, *(len(text.tokens) for text in texts[:-1])]).tolist()
    for name in ("softmax", "state"):
        confidences = own.confidences[name][starts]
        for threshold in (0.05, 0.1, 0.6, 0.9):
            keywords = {"exit_criterion": name, "exit_threshold": threshold, "return_dict_in_generate": True}
            output = model.generate(**tiny_inputs(4, 1), max_new_tokens=1, **keywords)
            sure = torch.cat([confidences >= threshold, torch.ones(4, 1).bool()], dim=1).int().argmax(dim=1) + 1
            assert output.layers_run[:, 0].tolist() == sure.tolist()


def test_batches_do_not_matter_and_some_layers_can_be_left_out():
    _, model = untidy(0)
    one, _, texts = forced_on(model, ("max_prob",), size=1)
    other, *_ = forced_on(model, ("max_prob",), size=4)
    assert torch.equal(one.agrees, other.agrees) and len(one.agrees) == sum(len(text.tokens) for text in texts)
    torch.testing.assert_close(one.confidences["max_prob"], other.confidences["max_prob"])
    some = one.asked_at((2, 5))
    assert some.layers == (2, 5) and torch.equal(some.agrees, one.agrees[:, [1, 4]])
    assert torch.equal(some.confidences["max_prob"], one.confidences["max_prob"][:, [1, 4]])
    assert len(join([one, one]).agrees) == 2 * len(one.agrees)


def test_positions_are_those_of_generate():
    seen = []

    class Watching:
        def confidence(self, point):
            seen.append((point.layer, point.positions, len(point.rows), tuple(point.previous.shape)))
            return point.hidden.new_zeros(len(point.rows))

    _, model = untidy(0)
    texts = [Text("", [5, 6, 7], []), Text("", [8], []), Text("", [9, 9], []), Text("", [4], [])]
    force(Numbers(model, 4), range(4), texts, {"watching": Watching()})
    assert seen == [(layer, [0, 1, 2, 0, 0, 1, 0], 7, (7, 32)) for layer in (1, 2, 3, 4, 5)]


def test_what_cannot_be_forced_is_refused():
    with pytest.raises(ValueError, match="'c' has candidates=4"):
        AskExits({"c": SoftmaxResponse(candidates=4), "s": StateSimilarity()})
    _, model = untidy(0)
    with pytest.raises(ValueError, match="one for each input"):
        force(Numbers(model, 4), range(4), [Text("", [5], [])], {})
    with pytest.raises(ValueError, match="training mode"):
        force(Numbers(model.train(), 1), range(1), [Text("", [5], [])], {})


def test_plain_values_are_by_curve_and_by_the_layers_asked():
    _, model = untidy(0)
    own, *_ = forced_on(model, ("softmax", "state"))
    asked = [*curve_candidates("softmax:2,4", [0.05, 0.2]), *curve_candidates("state", [0.5])]
    found = oracle_values(own, asked)
    assert set(found["oracles"]) == {"1,2,3,4,5", "2,4"} and list(found["curves"]) == ["softmax:2,4", "state"]
    some = own.asked_at((2, 4))
    first = first_agreeing(some.agrees, (2, 4), NUM_LAYERS).tolist()
    assert found["oracles"]["2,4"]["first"]["layers"] == pytest.approx(np.mean(first))
    assert found["oracles"]["2,4"]["first"]["shares"] == {str(one): first.count(one) / len(first) for one in (2, 4, 6)}
    curve = found["curves"]["softmax:2,4"]
    assert curve["exit_layers"] == [2, 4] and curve["asked"] == [0.2, 0.05]
    layers = {one["threshold"]: one["layers"] for one in curve["points"]}
    confidences = some.confidences["softmax"].tolist()
    expected = [2 if one >= 0.05 else 4 if other >= 0.05 else 6 for one, other in confidences]
    assert layers[0.05] == pytest.approx(np.mean(expected)) and layers[None] == NUM_LAYERS
    assert found["tokens"] == len(own.agrees) and found["same_layer"][-1]["agreement"] == 1
    assert found["rewritten"] == pytest.approx(float(own.rewritten.double().mean())) and found["tied"] == 0


# --- planted mistakes -----------------------------------------------------------------------------------------------


@swapped(oracle_curves, "oracle_points")
def gives_up_early_tokens_first(points):
    def mutant(own):
        first = first_agreeing(own.agrees, own.layers, own.num_layers)
        wrong = [(first <= kept) & (first > own.layers[0]) for kept in (0, *own.layers[1:], own.num_layers)]
        means = [(first.masked_fill(one, own.layers[0]), ~one) for one in wrong]
        return [OraclePoint(*(float(value.double().mean()) for value in pair)) for pair in means]

    return mutant


@swapped(oracle_curves, "_point")
def is_as_sure_as_at_another_layer(point):
    def mutant(own, name, threshold):
        shifted = {name: own.confidences[name].roll(1, 1)}
        return point(replace(own, confidences=shifted), name, threshold)

    return mutant


@pytest.mark.parametrize(
    ("mutate", "law"),
    [
        (gives_up_early_tokens_first, is_the_cheapest_of_all_choices),
        (is_as_sure_as_at_another_layer, a_criterion_by_hand),
    ],
    ids=lambda one: one.__name__,
)
def test_mistakes_are_noticed(monkeypatch, mutate, law):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        law()
