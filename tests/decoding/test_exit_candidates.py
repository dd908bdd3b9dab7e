"""Criteria that score only a few candidates, and confirm confident rows with the whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from hf_earlyexit import EarlyExitConfig, ExitPoint
from hf_earlyexit.decoding.run import ExitRun
from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.exits.criteria import WITH_CANDIDATES, MaxProbability, Shortlist, SoftmaxResponse
from tests import laws
from tests.tiny import NUM_LAYERS, VOCABULARY, tiny_inputs, tiny_pair
from tests.watching import counting, watched_exits


SEEDS = (0, 1, 2)
THRESHOLDS = {"softmax": 0.3, "max_prob": 0.5, "entropy": 0.15, "patience": 0.5}
HEADS = EarlyExitConfig(heads=["shared", "norm", "shortcut", "linear", "mlp"])


def later(counts: torch.Tensor) -> torch.Tensor:
    """Counts of the exit points after the first, in a model with an exit point after every layer."""
    return counts[2:NUM_LAYERS]


@torch.no_grad()
def shaken(model):
    """The model with exit heads that differ from the logit lens."""
    torch.manual_seed(0)
    for parameter in model.exit_heads.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# --- the laws -------------------------------------------------------------------------------------------------------


def test_criteria_with_candidates():
    assert WITH_CANDIDATES == ("softmax", "max_prob", "entropy", "patience")


@pytest.mark.parametrize(
    "criterion, rule",
    [*((criterion, "row") for criterion in WITH_CANDIDATES), ("softmax", "batch"), ("patience", "batch_joint")],
)
def test_candidates_follow_frozen_rows(criterion, rule):
    refusals, left = 0, torch.zeros(NUM_LAYERS + 1)
    for seed in SEEDS:
        stock, model = tiny_pair.shared("untied", seed)
        output, refused = laws.candidates_follow_frozen_rows(
            stock, model, tiny_inputs(4, seed), criterion, 4, THRESHOLDS[criterion], seed, batch_exit=rule
        )
        refusals += refused
        left += torch.bincount(output.layers_run.flatten(), minlength=NUM_LAYERS + 1)
    assert refusals > 0, "no row was sure and not confirmed"
    assert left[NUM_LAYERS] > 0
    assert (later(left) > 0).sum() >= 2, "few left where they were judged by candidates"


@pytest.mark.parametrize("count", (2, 3, 16))
def test_any_number_of_candidates_at_some_exit_points_with_every_kind_of_head(count):
    refusals = 0
    for seed, family in enumerate(("tied", "untied", "tied")):
        stock, model = tiny_pair(family, seed, early_exit=HEADS)
        output, refused = laws.candidates_follow_frozen_rows(
            stock, shaken(model), tiny_inputs(4, seed), "softmax", count, 0.1, seed, exit_layers=[2, 4, 5]
        )
        refusals += refused
        assert output.candidate_rows.nonzero().flatten().tolist() == [4, 5]
    assert refusals > 0


@pytest.mark.parametrize(
    "criterion, kwargs",
    [
        *((criterion, {}) for criterion in WITH_CANDIDATES),
        *((criterion, {"batch_exit": "batch"}) for criterion in ("max_prob", "patience")),
        *((criterion, {"num_beams": 3}) for criterion in ("softmax", "entropy")),
    ],
    ids=str,
)
def test_all_candidates_are_the_vocabulary(criterion, kwargs):
    depths = set()
    for seed in SEEDS:
        _, model = tiny_pair.shared("untied", seed)
        output = laws.all_candidates_are_the_vocabulary(model, tiny_inputs(4, seed), criterion, 0.0831, seed, **kwargs)
        depths |= set(output.layers_run.flatten().tolist())
    assert len(depths - {0}) >= 2 + ("batch_exit" not in kwargs)


@pytest.mark.parametrize(
    "criterion, kwargs",
    [
        *((criterion, {}) for criterion in WITH_CANDIDATES),
        *((criterion, {"num_beams": 3}) for criterion in ("softmax", "patience")),
    ],
    ids=str,
)
def test_batch_equals_rows_alone(criterion, kwargs):
    for seed in SEEDS[:1] if kwargs else SEEDS:
        _, model = tiny_pair.shared("untied", seed)
        output = laws.batch_equals_rows_alone(
            model,
            tiny_inputs(4, seed),
            lambda row: criterion,
            THRESHOLDS[criterion],
            seed,
            exit_candidates=4,
            **kwargs,
        )
        assert len(set(output.layers_run[output.layers_run > 0].tolist())) >= 3


@pytest.mark.parametrize("kwargs", ({}, {"num_beams": 3}, {"batch_exit": "batch"}), ids=str)
def test_lazy_is_eager(kwargs):
    settings = {"exit_criterion": "softmax", "exit_threshold": 0.3, "exit_candidates": 4} | kwargs
    for seed in SEEDS:
        _, model = tiny_pair.shared("tied", seed)
        lazy, eager = (
            laws.generate(model, tiny_inputs(4, seed), seed, fill=fill, **settings) for fill in ("lazy", "eager")
        )
        assert torch.equal(lazy.sequences, eager.sequences) and torch.equal(lazy.layers_run, eager.layers_run)
        assert torch.equal(lazy.head_rows, eager.head_rows)
        assert torch.equal(lazy.candidate_rows, eager.candidate_rows)


@pytest.mark.parametrize("beams", (1, 4))
def test_who_leaves_is_what_the_whole_vocabulary_says(beams):
    """The best candidate of an exiting row, recomputed beside the walk, is the best token, also with beams."""
    left, refused = 0, 0
    for seed in SEEDS:
        _, model = tiny_pair.shared("tied", seed)
        settings = {"exit_criterion": "softmax", "exit_candidates": 4, "exit_threshold": 0.3, "num_beams": beams}
        with watched_exits(model, 4) as exited:
            output = laws.generate(model, tiny_inputs(4, seed), seed, **settings)
        assert all(best == says for _, best, says in exited)
        judged = sum(layer > 1 for layer, _, _ in exited)
        left, refused = left + judged, refused + int(later(output.head_rows).sum()) - judged
    assert left > 0 and refused > 0


@pytest.mark.parametrize("kwargs", ({}, {"num_beams": 2}, {"batch_exit": "batch"}, {"fill": "eager"}), ids=str)
def test_work_reported_is_work_executed(kwargs):
    _, model = tiny_pair.shared("deeper decoder", 5)
    settings = {"exit_criterion": "softmax", "exit_threshold": 0.2, "exit_candidates": 5} | kwargs
    output = laws.work_is_what_ran(model, tiny_inputs(7, 5), **settings)
    asked = 5 * later(torch.tensor([0, *output.layer_rows.tolist()]))
    assert torch.equal(later(output.candidate_rows), asked) and not output.candidate_rows[[0, 1, NUM_LAYERS]].any()
    assert output.candidate_rows.shape == output.head_rows.shape == (NUM_LAYERS + 1,)


def test_candidates_meet_the_head_in_fewer_rows():
    _, model = tiny_pair.shared("tied", 0)
    settings = {"exit_criterion": "softmax", "exit_threshold": 0.3}
    plain = laws.generate(model, tiny_inputs(7), **settings)
    few = laws.generate(model, tiny_inputs(7), **settings, exit_candidates=8)
    per_token = [output.head_rows.sum() / (output.layers_run > 0).sum() for output in (plain, few)]
    assert per_token[1] < 0.5 * per_token[0] and not plain.candidate_rows.any()


@torch.no_grad()
def test_a_head_with_a_bias():
    """Candidates work with an LM head that has a bias, although T5's own has none."""
    stock, model = tiny_pair("untied", 1)
    head = nn.Linear(32, VOCABULARY, dtype=torch.float64)
    head.weight.copy_(stock.lm_head.weight)
    head.bias.mul_(10)
    stock.lm_head = model.lm_head = head
    output, refused = laws.candidates_follow_frozen_rows(stock, model, tiny_inputs(4, 1), "softmax", 4, 0.3, 1)
    assert refused > 0 and (output.candidate_rows > 0).any()


def test_criteria_in_half_precision():
    _, model = tiny_pair.shared("untied", 0, torch.bfloat16)
    settings = {"exit_criterion": "max_prob", "exit_threshold": 0.5, "exit_candidates": 4}
    output = laws.work_is_what_ran(model, tiny_inputs(4), **settings)
    assert (output.layers_run[output.layers_run > 0] < NUM_LAYERS).any()


def test_nothing_of_a_call_stays_on_the_model():
    _, model = tiny_pair.shared("untied", 0)
    before = set(vars(model)) | {name for name, _ in model.named_buffers()}
    settings = {"exit_criterion": "softmax", "exit_threshold": 0.3}
    plain = laws.generate(model, tiny_inputs(4), **settings)
    laws.generate(model, tiny_inputs(4), **settings, exit_candidates=2)
    again = laws.generate(model, tiny_inputs(4), **settings)
    assert torch.equal(plain.sequences, again.sequences) and torch.equal(plain.layers_run, again.layers_run)
    assert set(vars(model)) | {name for name, _ in model.named_buffers()} == before


# --- by hand --------------------------------------------------------------------------------------------------------

WEIGHTS = torch.eye(4)
FIRST = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 3.0, 2.0, 1.0], [0.0, 1.0, 2.0, 3.0]])
# The best token of row 0 is still 0; of row 1 it is 3, which is not a candidate; row 2 is nearly tied between its
# candidates 3 and 2.
SECOND = torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.0, 5.0, 0.0, 8.0], [0.0, 0.0, 1.0, 1.1]])


class Heads:
    """A vocabulary of 4 with the hidden states as logits, and a record of what was scored."""

    def __init__(self):
        self.full, self.some = [], []

    def point(self, layer: int, hidden: torch.Tensor, shortlist: Shortlist, rows=(0, 1, 2)) -> ExitPoint:
        return ExitPoint(
            layer, list(rows), [5] * len(rows), hidden, hidden, self.score, None, self.score_some, shortlist
        )

    def score(self, layer, hidden):
        self.full.append((layer, len(hidden)))
        return hidden @ WEIGHTS

    def score_some(self, layer, hidden, ids):
        self.some.append((layer, ids.tolist()))
        return (hidden @ WEIGHTS).gather(1, ids)


def test_two_exit_points_by_hand():
    heads, shortlist, criterion = Heads(), Shortlist(), SoftmaxResponse(candidates=2)
    first, second = heads.point(1, FIRST, shortlist), heads.point(2, SECOND, shortlist)
    torch.testing.assert_close(criterion.confidence(first), SoftmaxResponse().confidence(heads.point(1, FIRST, None)))
    assert first.confirm([True, False, True]) == [True, False, True] and heads.full == [(1, 3), (1, 3)]
    confidence = criterion.confidence(second)
    expected = [torch.tanh(torch.tensor(margin / 2)) for margin in (9.0, 5.0, 0.1)]  # two: tanh of half the margin
    torch.testing.assert_close(confidence, torch.stack(expected))
    assert heads.some == [(2, [[0, 1], [1, 2], [2, 3]])] and second.scored is None
    assert second.confirm([True, True, False]) == [True, False, False] and heads.full[2:] == [(2, 2)]
    (known, logits), (unknown, nothing) = second.known_logits([0, 2])
    assert (known, unknown, nothing) == ([0], [2], None) and torch.equal(logits, SECOND[:1])
    assert len(heads.full) == 3 and len(heads.some) == 1, "everything is scored once"


def test_candidates_go_with_their_rows():
    heads, shortlist, criterion = Heads(), Shortlist(), MaxProbability(candidates=3)
    criterion.confidence(heads.point(1, FIRST, shortlist))
    criterion.confidence(heads.point(2, SECOND[1:], shortlist, rows=(1, 2)))
    criterion.confidence(heads.point(3, SECOND[2:], shortlist, rows=(2,)))
    assert heads.some == [(2, [[1, 2, 3], [1, 2, 3]]), (3, [[1, 2, 3]])]


def test_of_equally_likely_candidates_the_lowest_id_is_chosen_as_without_candidates():
    heads, shortlist = Heads(), Shortlist()
    heads.point(1, FIRST, shortlist).first_choices(2)
    tied = heads.point(2, torch.ones_like(SECOND), shortlist)
    assert tied.scores(2).unique().numel() == 1, "every candidate is as likely"
    assert tied.first_choices(2).tolist() == [0, 1, 2] and heads.some[-1] == (2, [[0, 1], [1, 2], [2, 3]])


def test_nobody_sure_nothing_confirmed():
    heads, shortlist = Heads(), Shortlist()
    for layer in (1, 2):
        point = heads.point(layer, SECOND, shortlist)
        SoftmaxResponse(2).confidence(point)
        assert point.confirm([False] * 3) == [False] * 3
    assert heads.full == [(1, 3)] and point.known_logits([0, 1]) == [([0, 1], None)]


@dataclass(frozen=True)
class Both:
    """A custom criterion that combines two criteria with candidate lists of different lengths."""

    def confidence(self, point):
        return torch.minimum(
            SoftmaxResponse(candidates=3).confidence(point), MaxProbability(candidates=2).confidence(point)
        )


def test_a_criterion_of_several_parts():
    heads, shortlist = Heads(), Shortlist()
    for layer in (1, 2):
        point = heads.point(layer, (FIRST, SECOND)[layer - 1], shortlist)
        Both().confidence(point)
        Both().confidence(point)
    assert heads.full == [(1, 3)] and [(layer, len(ids[0])) for layer, ids in heads.some] == [(2, 3), (2, 2)]
    # The best token of row 1 is 3, which is among its three candidates but not among its best two.
    assert point.confirm([True, True, True]) == [True, False, True]
    _, model = tiny_pair.shared("untied", 0)
    with counting(model) as counts:
        output = laws.generate(model, tiny_inputs(4), exit_criterion=Both(), exit_threshold=0.3)
    assert output.head_rows.sum() == counts["head"][0] and output.candidate_rows.sum() == counts["candidates"][0]
    assert (output.layers_run[output.layers_run > 0] < NUM_LAYERS).any()


def test_an_object_with_too_many_candidates_is_named():
    _, model = tiny_pair.shared("tied", 0)
    with pytest.raises(ValueError, match="`candidates=98` must be at most the vocabulary, 97"):
        model.generate(
            **tiny_inputs(2), max_new_tokens=3, exit_criterion=SoftmaxResponse(candidates=98), exit_threshold=0.5
        )


# --- settings -------------------------------------------------------------------------------------------------------


def test_the_setting_makes_the_criterion():
    merge = ExitSettings.merge
    for name in WITH_CANDIDATES:
        asked = {"exit_criterion": name, "exit_threshold": 0.5}
        assert merge(asked | {"exit_candidates": 8}, None, None).criterion.candidates == 8
        assert merge(asked, None, None).criterion.candidates is None
    run = ExitRun(merge(asked | {"exit_candidates": 8}, None, None), [1], 2, 1, 4, "cpu")
    assert run.criterion.candidates == 8


def test_settings_merge():
    merge = ExitSettings.merge
    stored = GenerationConfig(exit_criterion="softmax", exit_threshold=0.9, exit_candidates=8, early_exit=True)
    assert merge({}, None, stored).exit_candidates == 8
    assert merge({"exit_threshold": 0.5, "exit_criterion": "softmax"}, None, stored).exit_candidates == 8
    assert merge({}, GenerationConfig(exit_candidates=4), stored).exit_candidates == 4
    assert merge({"exit_candidates": 2}, GenerationConfig(exit_candidates=4), stored).exit_candidates == 2
    # Stored candidates are dropped for another criterion, with or without candidates.
    for other in ("state", "entropy"):
        settings = merge({"exit_criterion": other, "exit_threshold": 0.5}, None, stored)
        assert settings.exit_candidates is None and settings.exit_threshold == 0.5
    assert merge({"exit_criterion": "fixed", "exit_layer": 2}, None, stored).exit_candidates is None
    assert merge({"early_exit": False}, None, stored).early_exit is False


def test_what_is_stored_and_does_not_go_together_is_refused_when_it_is_used():
    stored = GenerationConfig(exit_criterion="state", exit_threshold=0.9, exit_candidates=8, early_exit=True)
    with pytest.raises(ValueError, match="`exit_candidates=8` goes with .*not 'state': leave it out"):
        ExitSettings.merge({}, None, stored)
    assert ExitSettings.merge({"early_exit": False}, None, stored).early_exit is False


def test_it_goes_through_save_and_load(tmp_path):
    _, model = tiny_pair("untied", 0, torch.float32)
    settings = {"exit_criterion": "softmax", "exit_threshold": 0.3, "exit_candidates": 4}
    expected = laws.generate(model, tiny_inputs(4), **settings)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.generation_config.exit_candidates == 4
    for one in (model, again):
        output = laws.generate(one, tiny_inputs(4))
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.layers_run, expected.layers_run)
        assert torch.equal(output.candidate_rows, expected.candidate_rows)
    assert expected.candidate_rows.any()
