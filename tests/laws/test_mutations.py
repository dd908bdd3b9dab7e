"""Planted mutations of the mechanism, each with a law that detects it.

A mutation replaces one function by a wrong one; the named law must fail under it and hold without it.
"""

from __future__ import annotations

import functools

import pytest
import torch

from hf_earlyexit.decoding import cache, layers, run
from hf_earlyexit.exits import criteria
from hf_earlyexit.families.t5 import decoder as t5
from hf_earlyexit.generation import mixin
from hf_earlyexit.kernels import attention
from hf_earlyexit.kernels.rows import Rows
from tests import laws
from tests.generation import test_source_masks
from tests.tiny import NUM_LAYERS, tiny_inputs, tiny_pair
from tests.watching import pseudo_random_script


Cache, Decoder, Run = cache.EarlyExitCache, t5.T5Decoder, run.ExitRun


# --- the laws, each as a function of a family that builds its own models --------------------------------------------


def frozen_rows(family="untied"):
    for seed in (0, 1):
        stock, model = tiny_pair(family, seed)
        laws.follows_frozen_rows(stock, model, tiny_inputs(4, seed), pseudo_random_script(seed, NUM_LAYERS), seed)


def rows_alone(family="untied"):
    for seed in (0, 1):
        laws.scripted_batch_equals_rows_alone(tiny_pair(family, seed)[1], seed)


def beams_alone(family="untied"):
    for seed in (0, 1):
        _, model = tiny_pair(family, seed)
        laws.batch_equals_rows_alone(model, tiny_inputs(4, seed), lambda row: "softmax", 0.1, seed, num_beams=3)


def beams_lazy_and_eager(family="untied"):
    for seed in (0, 1, 2):
        _, model = tiny_pair(family, seed)
        kwargs = {"exit_criterion": "softmax", "exit_threshold": 0.08, "num_beams": 4}
        outputs = [laws.generate(model, tiny_inputs(4, seed), seed, fill=fill, **kwargs) for fill in ("lazy", "eager")]
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)
        torch.testing.assert_close(outputs[0].sequences_scores, outputs[1].sequences_scores)


def never(family="untied"):
    for seed in (0, 1):
        stock, model = tiny_pair(family, seed)
        laws.never_equals_stock(stock, model, tiny_inputs(4, seed), seed)


def never_with_beams(family="untied"):
    for seed in (0, 1):
        stock, model = tiny_pair(family, seed)
        laws.never_equals_stock(stock, model, tiny_inputs(4, seed), seed, num_beams=4)


def criteria_frozen_rows(family="untied"):
    for criterion, threshold in (("softmax", 0.08), ("state", 0.75)):
        stock, model = tiny_pair(family, 1)
        laws.exits_replayed_follow_frozen_rows(stock, model, tiny_inputs(4, 1), criterion, threshold)


def ended_rows_rest(family="untied"):
    _, model = tiny_pair(family, 0)
    laws.ended_rows_rest(model, tiny_inputs(7))


def cut(family="untied"):
    for layer in (1, 3):
        laws.fixed_exit_equals_cut_stock(*tiny_pair(family, 1), tiny_inputs(4, 1), layer, 1)


def work(family="untied"):
    _, model = tiny_pair(family, 0)
    laws.work_is_what_ran(model, tiny_inputs(4), exit_criterion="softmax", exit_threshold=0.1)
    laws.work_is_what_ran(model, tiny_inputs(4), exit_criterion="state", exit_threshold=0.8)


def single_rows(family="untied"):
    test_source_masks.full_depth_is_stock("plain", "right")


def candidates(family="tied"):
    stock, model = tiny_pair(family, 2)
    for rule in ("row", "batch"):
        laws.candidates_follow_frozen_rows(stock, model, tiny_inputs(7, 2), "softmax", 4, 0.3, 2, batch_exit=rule)


# --- the mutations --------------------------------------------------------------------------------------------------


def swapped(owner, name):
    """Decorator: makes a mutation that replaces `owner.name` by the decorated function's result for the original."""

    def decorate(make):
        @functools.wraps(make)
        def mutate(monkeypatch):
            monkeypatch.setattr(owner, name, make(getattr(owner, name)))

        return mutate

    return decorate


@swapped(Cache, "keep")
def parks_at_the_wrong_position(park):
    def mutant(self, rows, hidden):
        lengths, self.lengths = self.lengths, [max(0, length - 1) for length in self.lengths]
        park(self, rows, hidden)
        self.lengths = lengths

    return mutant


@swapped(Cache, "keep")
def parks_another_rows_state(park):
    return lambda self, rows, hidden: park(self, rows, hidden.roll(1, 0))


@swapped(Cache, "keep")
def parks_another_layers_state(park):
    def mutant(self, rows, hidden):
        return park(self, rows, hidden * 0.5 + 0.1)

    return mutant


@swapped(Decoder, "project")
def projects_without_the_norm(project):
    def mutant(self, layer, states):
        return self._keys_values(self.blocks[layer - 1].layer[0].SelfAttention, states)

    return mutant


@swapped(Decoder, "project")
def projects_with_the_layer_below(project):
    return lambda self, layer, states: project(self, max(1, layer - 1), states)


@swapped(Decoder, "project")
def swaps_keys_and_values(project):
    return lambda self, layer, states: project(self, layer, states)[::-1]


@swapped(Cache, "fill_cross")
def leaves_cross_attention_stale(fill_cross):
    """Cross-attention of a layer is filled for the first rows that reach it and marked as filled for all."""

    def mutant(self, layer, rows, project):
        if any(self.cross_filled[layer - 1]):
            self.cross_filled[layer - 1] = [True] * self.num_rows
        fill_cross(self, layer, rows, project)

    return mutant


@swapped(Cache, "fill_cross")
def takes_the_first_rows_encoder_states(fill_cross):
    def mutant(self, layer, rows, project):
        fill_cross(self, layer, rows, lambda at, states: project(at, self.encoder_states[: len(states)]))

    return mutant


@swapped(Cache, "_project_missing")
def pays_one_position_too_few(pay):
    return lambda self, layer, missing, project: pay(
        self, layer, [(row, start, max(start + 1, stop - 1)) for row, start, stop in missing], project
    )


@swapped(Cache, "backfill")
def never_pays(backfill):
    return lambda self, layer, rows, project: 0


@swapped(Cache, "write")
def writes_to_the_wrong_rows(write):
    def mutant(self, layer, rows, keys, values):
        first = Rows(range(len(rows)), rows.batch_size, rows.device)
        write(self, layer, first, keys, values)

    return mutant


@swapped(Decoder, "_self_bias")
def shifts_the_relative_bias(self_bias):
    return lambda self, rows, own_cache, length: self_bias(self, rows, own_cache, length).roll(1, -1)


@swapped(Decoder, "_follow")
def keeps_the_padding_of_the_first_rows(follow):
    def mutant(self, rows):
        follow(self, rows)
        self.row_cross_mask = self.cross_mask[: len(rows)] if self.cross_mask.shape[0] > 1 else self.cross_mask

    return mutant


@swapped(Decoder, "__init__")
def drops_the_source_mask_of_single_rows(init):
    def mutant(self, *args):
        init(self, *args)
        if self.cross_mask.shape[0] == 1:
            self.cross_mask.zero_()

    return mutant


@swapped(attention, "attend")
def attends_for_the_wrong_rows(attend):
    def mutant(live, module, query, key, value, live_rows, **kwargs):
        first = Rows(range(len(live_rows)), live_rows.batch_size)
        return attend(live, module, query, key, value, first, **kwargs)

    return mutant


@swapped(Decoder, "head_input")
def skips_the_final_norm(head_input):
    return lambda self, layer, hidden: hidden * self.model.model_dim**-0.5


@swapped(Run, "record_finished")
def lets_ended_rows_run(record_finished):
    return lambda self, finished: None


@swapped(layers, "gather_logits")
def mixes_up_the_logits(gather_logits):
    return lambda decoder, exited, own_run: gather_logits(decoder, exited, own_run).roll(1, 0)


@swapped(layers, "exited_rows")
def reuses_another_tokens_logits(exited_rows):
    def flipped(exited):
        return exited if exited.logits is None else exited._replace(logits=exited.logits.flip(-1))

    return lambda point, rows, leaving: [flipped(exited) for exited in exited_rows(point, rows, leaving)]


@swapped(Cache, "reorder_cache")
def does_not_reorder(reorder_cache):
    return lambda self, beam_idx: None


@swapped(Cache, "reorder_cache")
def reorders_without_the_parked_states(reorder_cache):
    def mutant(self, beam_idx):
        kept, self.kept = self.kept, None
        reorder_cache(self, beam_idx)
        self.kept = kept

    return mutant


@swapped(Cache, "_take_bookkeeping")
def reorders_without_the_debts(take_bookkeeping):
    def mutant(self, sources, cross):
        filled = self.filled
        take_bookkeeping(self, sources, cross)
        self.filled = filled

    return mutant


@swapped(mixin.ExitRun, "_threshold")
def asks_with_another_threshold_in_later_steps(threshold):
    return lambda self, position: threshold(self, position) if position < 3 else 2.0


@swapped(Run, "layers_run")
def counts_layers_from_zero(layers_run):
    return lambda self: (layers_run(self) - 1).clamp(min=0)


@swapped(Decoder, "project")
def projects_twice(project):
    """Correct keys and values with twice the work, which the counters must show."""

    def mutant(self, layer, states):
        project(self, layer, states)
        return project(self, layer, states)

    return mutant


@swapped(criteria.ExitPoint, "confirm")
def believes_candidates(confirm):
    return lambda self, passed: passed


@swapped(criteria.ExitPoint, "confirm")
def confirms_whoever_passes(confirm):
    """The full head is evaluated and its result is ignored."""
    return lambda self, passed: confirm(self, passed) and passed


@swapped(criteria.ExitPoint, "known_logits")
def forgets_what_confirmed(known_logits):
    return lambda self, places: [(places, None)]


@swapped(criteria.ExitPoint, "known_logits")
def hands_out_another_rows_confirmation(known_logits):
    rolled = lambda logits: logits if logits is None else logits.roll(1, 0)  # noqa: E731
    return lambda self, places: [(known, rolled(logits)) for known, logits in known_logits(self, places)]


@swapped(criteria.Shortlist, "of")
def scores_another_rows_candidates(of):
    def mutant(self, rows, count):
        ids = of(self, rows, count)
        return ids if ids is None else ids.roll(1, 0)

    return mutant


@swapped(criteria.Shortlist, "of")
def keeps_the_first_rows_candidates(of):
    """Continuing rows get candidates by their place among the remaining rows, not by row."""

    def mutant(self, rows, count):
        ids = of(self, self._chosen[count][0], count) if count in self._chosen else None
        return ids if ids is None else ids[: len(rows)]

    return mutant


@swapped(Run, "begin_step")
def keeps_the_candidates_of_the_step_before(begin_step):
    def mutant(self, length):
        kept, live = getattr(self, "shortlist", None), begin_step(self, length)
        self.shortlist = kept or self.shortlist
        return live

    return mutant


@swapped(Decoder, "lm_head_rows")
def scores_candidates_without_the_scale(lm_head_rows):
    return lambda self, head_input, ids: lm_head_rows(self, head_input, ids) * self.model.model_dim**0.5


MUTATIONS = [
    (parks_at_the_wrong_position, frozen_rows),
    (parks_another_rows_state, rows_alone),
    (parks_another_layers_state, frozen_rows),
    (projects_without_the_norm, frozen_rows),
    (projects_with_the_layer_below, frozen_rows),
    (swaps_keys_and_values, frozen_rows),
    (leaves_cross_attention_stale, rows_alone),
    (takes_the_first_rows_encoder_states, frozen_rows),
    (pays_one_position_too_few, frozen_rows),
    (never_pays, frozen_rows),
    (writes_to_the_wrong_rows, rows_alone),
    (shifts_the_relative_bias, never),
    (keeps_the_padding_of_the_first_rows, rows_alone),
    (drops_the_source_mask_of_single_rows, single_rows),
    (attends_for_the_wrong_rows, rows_alone),
    (skips_the_final_norm, cut),
    (lets_ended_rows_run, ended_rows_rest),
    (mixes_up_the_logits, rows_alone),
    (reuses_another_tokens_logits, criteria_frozen_rows),
    (believes_candidates, candidates),
    (confirms_whoever_passes, candidates),
    (forgets_what_confirmed, candidates),
    (hands_out_another_rows_confirmation, candidates),
    (scores_another_rows_candidates, candidates),
    (keeps_the_first_rows_candidates, candidates),
    (keeps_the_candidates_of_the_step_before, candidates),
    (scores_candidates_without_the_scale, candidates),
    (does_not_reorder, never_with_beams),
    (reorders_without_the_parked_states, beams_lazy_and_eager),
    (reorders_without_the_debts, beams_lazy_and_eager),
    (asks_with_another_threshold_in_later_steps, frozen_rows),
    (counts_layers_from_zero, cut),
    (projects_twice, work),
]
LAWS = (
    never,
    never_with_beams,
    cut,
    rows_alone,
    frozen_rows,
    criteria_frozen_rows,
    candidates,
    single_rows,
    beams_alone,
    beams_lazy_and_eager,
    ended_rows_rest,
    work,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_laws_hold_without_mutations(law):
    law()


@pytest.mark.parametrize("mutate, law", MUTATIONS, ids=lambda one: one.__name__)
def test_mutation_breaks_a_law(monkeypatch, mutate, law):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        law()
