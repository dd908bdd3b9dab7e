"""Simulated walks match values by hand, and the counts of a real `generate` call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from hf_earlyexit.exits.criteria import SoftmaxResponse
from hf_earlyexit.speed.simulation import batches_of, draw_layers, leave_at, pieces_of, simulate
from hf_earlyexit.speed.timed_walk import Replay
from tests.tiny import NUM_LAYERS, tiny_inputs, tiny_pair


END = 3


class EndAt(LogitsProcessor):
    """Ends row `r` at its token number `lengths[r]`, and not before."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores[:, END] = -torch.inf
        over = [input_ids.shape[1] >= length for length in self.lengths]
        scores[over] = -torch.inf
        scores[over, END] = 0
        return scores


def generated_work(model, script: np.ndarray, exit_layers, asked, rule: str) -> dict[str, list[int]]:
    """The counts of `generate` when rows may exit and end as `script [steps, rows]` says."""
    output = model.generate(
        **tiny_inputs(script.shape[1]),
        exit_criterion=Replay(script, asked),
        exit_threshold=0.5,
        exit_layers=list(exit_layers),
        batch_exit=rule,
        eos_token_id=END,
        pad_token_id=0,
        max_new_tokens=len(script) + 1,
        logits_processor=LogitsProcessorList([EndAt((script > 0).sum(axis=0))]),
        return_dict_in_generate=True,
    )
    return {name: output[name].tolist() for name in ("layer_rows", "filled_positions", "head_rows")}


def random_texts(count: int, seed: int, longest: int = 12) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(1, NUM_LAYERS + 1, draw.integers(3, longest + 1)).tolist() for _ in range(count)]


def test_a_walk_by_hand():
    """Two rows, one of which ends a token earlier; exits evaluated at 1 and 2 of 3 layers."""
    walked = simulate(batches_of([[1, 3, 2], [3, 1]], 2), 3, (1, 2), scores=True)
    assert walked.depths.tolist() == [[[1, 3], [3, 1], [2, 0]]]
    assert walked.rows[:, 0].tolist() == [[2, 2, 1], [1, 1, 1], [1, 1, 0]]
    assert walked.keys[:, 0].tolist() == [[2, 4, 3], [1, 2, 3], [1, 2, 0]]
    assert walked.owed[:, 0].tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert walked.newcomers[:, 0].tolist() == [[2, 0, 0], [1, 1, 0], [1, 1, 0]]
    assert walked.departed[:, 0].tolist() == [[1, 1, 0], [0, 0, 1], [1, 1, 0]]
    assert walked.head_products[:, 0].tolist() == [[2, 2, 1], [1, 1, 1], [1, 1, 0]]
    assert (walked.tokens, walked.steps, walked.mean_layers) == (5, 3, 2.0)


def test_rows_that_nobody_has_scored_meet_the_head_together():
    walked = simulate(batches_of([[1, 3], [3, 3]], 2), 3, (1,))
    assert walked.head_products[:, 0].tolist() == [[0, 0], [0, 0], [2, 2]]
    assert walked.head_rows[:, 0].tolist() == [[1, 0], [0, 0], [1, 2]]


def test_tokens_leave_at_the_first_layer_asked_that_is_not_below_theirs():
    could = batches_of([[1, 2, 3, 4, 5, 6], [6, 2, 2]], 2)
    assert leave_at(could, 6, (2, 4))[0, :, 0].tolist() == [2, 2, 4, 4, 6, 6]
    assert leave_at(could, 6, ())[0].tolist() == [[6, 6]] * 3 + [[6, 0]] * 3
    assert leave_at(could, 6, (2, 4), "batch")[0].tolist() == [[6, 6], [2, 2], [4, 4], [4, 0], [6, 0], [6, 0]]
    with pytest.raises(ValueError, match="`rule` must be one of"):
        leave_at(could, 6, (2,), "batch_joint")


@pytest.mark.parametrize("rule", ("row", "batch"))
@pytest.mark.parametrize("asked", (None, SoftmaxResponse()))
@pytest.mark.parametrize("rows", (1, 4))
def test_simulated_work_is_work_that_generate_counts(rows, asked, rule):
    _, model = tiny_pair("untied")
    for seed, exit_layers in enumerate(((1, 2, 3, 4, 5), (2, 4), (3,))):
        scripts = batches_of(random_texts(rows, seed), rows)
        walked = simulate(scripts, NUM_LAYERS, exit_layers, scores=asked is not None, rule=rule)
        work = walked.work_by_layer()
        assert generated_work(model, scripts[0], exit_layers, asked, rule) == work
        assert walked.owed.max() >= 2 and sum(work["filled_positions"]) > 0, "no debt of two positions was paid"
        assert rows == 1 or len(set((scripts[0] > 0).sum(axis=0).tolist())) > 1, "all rows ended at the same step"


def test_batches_do_not_owe_each_other():
    texts = random_texts(6, 7)
    together = simulate(batches_of(texts, 2), NUM_LAYERS, (1, 3)).work_by_layer()
    each = [simulate(batches_of(texts[at : at + 2], 2), NUM_LAYERS, (1, 3)).work_by_layer() for at in (0, 2, 4)]
    assert together == {name: np.sum([one[name] for one in each], axis=0).tolist() for name in together}


def test_texts_are_cut_into_pieces_one_behind_the_other():
    pieces = pieces_of([[1, 2, 3], [4, 5]], batches=2, rows=2, tokens=2)
    assert pieces.transpose(0, 2, 1).tolist() == [[[1, 2], [3, 4]], [[5, 1], [2, 3]]]
    assert batches_of([[1, 2, 3], [4, 5], [6]], 2).transpose(0, 2, 1).tolist() == [
        [[1, 2, 3], [4, 5, 0]],
        [[6, 0, 0], [0, 0, 0]],
    ]


def test_drawn_layers_follow_the_distribution():
    layers = np.array(draw_layers([0.5, 0, 0.3, 0.2], 100, 100, seed=1))
    assert np.allclose([(layers == layer).mean() for layer in (1, 2, 3, 4)], [0.5, 0, 0.3, 0.2], atol=0.02)
    assert draw_layers([1, 3], 2, 5, seed=4) == draw_layers([1, 3], 2, 5, seed=4)
