"""Thresholds and confidences at their limits, and logits processors after the exit."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from hf_earlyexit import ExitPoint
from tests import laws
from tests.tiny import NUM_LAYERS, tiny_inputs, tiny_pair


@pytest.fixture(scope="module")
def model():
    return tiny_pair("untied", 1)[1]


def depths(output) -> set[int]:
    return {*output.layers_run.flatten().tolist()} - {0}


def test_threshold_1_is_not_never_and_none_is():
    """At threshold 1 a token still exits if a saturated softmax has a confidence of exactly 1; None disables exits."""
    _, model = tiny_pair("untied", 1, torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(2000)
    call = {"exit_criterion": "softmax", "max_new_tokens": 4}
    output = laws.generate(model, tiny_inputs(3), exit_threshold=1.0, **call)
    assert min(depths(output)) < NUM_LAYERS and (output.exit_confidences.nan_to_num(1) == 1).all()
    assert depths(laws.generate(model, tiny_inputs(3), exit_threshold=None, **call)) == {NUM_LAYERS}


@pytest.mark.parametrize("criterion", ["softmax", "max_prob", "entropy", "state", "patience"])
def test_at_threshold_0_every_token_leaves_where_it_is_first_asked(criterion, model):
    call = {"exit_criterion": criterion, "exit_threshold": 0.0, "max_new_tokens": 3}
    assert depths(laws.generate(model, tiny_inputs(3), **call)) == {1}
    assert depths(laws.generate(model, tiny_inputs(3), **call, exit_layers=[3, 5])) == {3}


def test_state_leaves_after_layer_2_at_the_earliest_above_0(model):
    call = {"exit_criterion": "state", "exit_threshold": 1e-6, "max_new_tokens": 6}
    assert min(depths(laws.generate(model, tiny_inputs(3), **call))) == 2


class BanTheBest(LogitsProcessor):
    """Bans the best token of every step."""

    def __init__(self):
        self.banned = []

    def __call__(self, input_ids, scores):
        best = scores.argmax(dim=-1, keepdim=True)
        self.banned.append(best[:, 0].tolist())
        return scores.scatter(1, best, -float("inf"))


@pytest.mark.parametrize("exit_candidates", [None, 8])
def test_confidence_is_about_the_heads_own_scores(model, exit_candidates):
    """With the best token banned, a row exits at the same layer with the same confidence and generates the second best
    token of that layer, since processors run after the exit and after candidates are confirmed."""
    ban, settings = BanTheBest(), {"exit_criterion": "softmax", "exit_threshold": 0.08, "max_new_tokens": 1}
    settings |= {"exit_candidates": exit_candidates, "ends": None}
    free = laws.generate(model, tiny_inputs(6), **settings, logits_processor=None)
    banned = laws.generate(model, tiny_inputs(6), **settings, logits_processor=LogitsProcessorList([ban]))
    assert torch.equal(free.layers_run, banned.layers_run) and min(depths(free)) < NUM_LAYERS
    torch.testing.assert_close(free.exit_confidences, banned.exit_confidences, equal_nan=True)
    assert ban.banned == [free.sequences[:, -1].tolist()]
    second = free.logits[0].topk(2, dim=-1).indices[:, 1]
    assert torch.equal(banned.sequences[:, -1], second) and not torch.equal(banned.sequences, free.sequences)


def test_a_criterion_is_shown_no_processed_scores(model):
    seen = []

    class Watching:
        def confidence(self, point: ExitPoint) -> torch.Tensor:
            seen.append(torch.equal(point.logits, model.lm_head(model.exit_head_input(point.layer, point.hidden))))
            return point.hidden.new_zeros(len(point.rows))

    call = {"exit_criterion": Watching(), "exit_threshold": 0.5, "max_new_tokens": 3}
    laws.generate(model, tiny_inputs(2), **call, repetition_penalty=3.0, no_repeat_ngram_size=1)
    assert len(seen) >= 3 * (NUM_LAYERS - 1) and all(seen)
