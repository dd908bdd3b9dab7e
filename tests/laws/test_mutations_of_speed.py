"""Planted mutations of fast decoding, each with a law that detects it.

As in `test_mutations.py`, which mutates the walk and the library's blocks; this module mutates the token loop, the
prepared copy and the compiled segments.
"""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig

from hf_earlyexit.decoding import cache, layers, token_loop
from hf_earlyexit.families.t5 import compiled as t5_compiled
from hf_earlyexit.families.t5 import prepared as t5_prepared
from hf_earlyexit.families.t5 import segments as t5_segments
from hf_earlyexit.kernels.rows import Rows
from tests import laws
from tests.generation import test_source_masks
from tests.laws.test_mutations import swapped
from tests.tiny import NUM_LAYERS, tiny_inputs, tiny_pair
from tests.watching import Scripted, pseudo_random_script


Prepared, Compiled = t5_prepared.PreparedT5Decoder, t5_compiled.CompiledT5Decoder
Run = token_loop.ExitRun


# --- the laws -------------------------------------------------------------------------------------------------------


def prepared_never():
    for seed in (0, 1):
        stock, model = tiny_pair("untied", seed)
        laws.never_equals_stock(stock, model.prepare_for_generation(), tiny_inputs(4, seed), seed)


def prepared_frozen_rows():
    for seed in (0, 1):
        stock, model = tiny_pair("untied", seed)
        script = pseudo_random_script(seed, NUM_LAYERS)
        laws.follows_frozen_rows(stock, model.prepare_for_generation(), tiny_inputs(4, seed), script, seed)


def compiled_frozen_rows():
    """Rows exit after layers 2 and 4, so all segments have two layers; they seldom exit together."""
    torch._dynamo.reset()
    _, model = tiny_pair("untied", 1)
    script = pseudo_random_script(1, 3)
    call = {"exit_criterion": Scripted(lambda row, position: 2 * script(row, position)), "exit_threshold": 0.5}
    call |= {"exit_layers": [2, 4]}
    expected = laws.generate(model, tiny_inputs(3, 1), 1, **call)
    keywords = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t5_compiled, "most_rows", lambda own_cache: own_cache.num_rows)
        output = laws.generate(model, tiny_inputs(3, 1), 1, **call, **keywords)
    assert torch.equal(output.sequences, expected.sequences)
    for mine, others in zip(output.logits, expected.logits):
        torch.testing.assert_close(mine, others)


def sampling_is_stock():
    stock, model = tiny_pair("tied", 1)
    torch.manual_seed(1)
    expected = laws.stock_generate(stock, tiny_inputs(4, 1), 1, do_sample=True)
    torch.manual_seed(1)
    output = laws.generate(model, tiny_inputs(4, 1), 1, do_sample=True)
    assert torch.equal(output.sequences, expected.sequences)


def ended_rows_rest():
    _, model = tiny_pair("untied", 0)
    laws.ended_rows_rest(model.prepare_for_generation(), tiny_inputs(7))


def state_is_the_last_layers():
    """`previous` of an exit point is the output of the layer below, with and without a prepared copy."""
    _, model = tiny_pair("untied", 1)
    call = {"exit_criterion": "state", "exit_threshold": 0.75, "exit_layers": [3, 5]}
    expected = laws.generate(model, tiny_inputs(4, 1), 1, **call)
    output = laws.generate(model.prepare_for_generation(), tiny_inputs(4, 1), 1, **call)
    torch.testing.assert_close(output.exit_confidences, expected.exit_confidences, equal_nan=True)
    assert torch.equal(output.layers_run, expected.layers_run)


def prepared_single_rows():
    test_source_masks.full_depth_is_stock("prepared", "right")


def compiled_prompts():
    """A prompt runs the prepared layers even if single positions are compiled."""
    test_source_masks.exits_follow_the_reference("compiled", "holes", prompted=True)


def compiled_single_rows():
    test_source_masks.exits_follow_the_reference("compiled", "left")


# --- the mutations --------------------------------------------------------------------------------------------------


@swapped(t5_prepared.Norm, "__call__")
def skips_the_norms(call):
    return lambda self, states: states


@swapped(Prepared, "project")
def pays_without_the_norm(project):
    def mutant(self, layer, states):
        norm, self.prepared.layers[layer - 1].norm = self.prepared.layers[layer - 1].norm, lambda states: states
        try:
            return project(self, layer, states)
        finally:
            self.prepared.layers[layer - 1].norm = norm

    return mutant


@swapped(t5_prepared.PreparedT5, "stacked")
def pays_at_once_with_the_layers_below(stacked):
    def mutant(self, first):
        lower, upper = stacked(self, first - 1), stacked(self, first)
        return lambda states: lower(states)[:, : upper.out_features]

    return mutant


@swapped(Prepared, "_by_head")
def swaps_queries_and_keys(by_head):
    def mutant(self, projected, rows, parts):
        found = by_head(self, projected, rows, parts)
        return found[[1, 0, 2]] if parts == 3 else found

    return mutant


@swapped(Prepared, "run_blocks")
def takes_the_first_layers_input_for_the_last_ones(run_blocks):
    def mutant(self, layers, hidden, rows, own_cache):
        return run_blocks(self, layers, hidden, rows, own_cache)[0], hidden

    return mutant


@swapped(Prepared, "__init__")
def drops_the_source_mask_of_single_rows(init):
    def mutant(self, *args):
        init(self, *args)
        self.pads_source = self.cross_mask.shape[0] > 1

    return mutant


@swapped(Compiled, "_present")
def compiles_single_rows_without_their_source_mask(present):
    def mutant(self, rows, own_cache):
        found = present(self, rows, own_cache)
        if own_cache.num_rows == 1:
            found.cross_bias.zero_()
        return found

    return mutant


@swapped(layers, "segments")
def forgets_a_layer(segments):
    return lambda num_layers, points: [one[1:] if len(one) > 1 else one for one in segments(num_layers, points)]


@swapped(cache.EarlyExitCache, "write_layers")
def writes_segments_to_the_wrong_rows(write_layers):
    def mutant(self, layers, rows, keys_values):
        write_layers(self, layers, Rows(range(len(rows)), rows.batch_size, rows.device), keys_values)

    return mutant


@swapped(Compiled, "_present")
def attends_to_a_position_too_few(present):
    def mutant(self, rows, own_cache):
        found = present(self, rows, own_cache)
        found.bias.copy_(found.bias.roll(-1, -1))
        return found

    return mutant


@swapped(Compiled, "_present")
def attends_to_the_first_rows(present):
    def mutant(self, rows, own_cache):
        found = present(self, rows, own_cache)
        found.rows.copy_(torch.arange(len(found.rows)).clamp(max=own_cache.num_rows - 1))
        return found

    return mutant


@swapped(t5_segments, "attend_self")
def forgets_the_present(attend_self):
    return lambda query, key, value, past, present: attend_self(query, 0 * key, 0 * value, past, present)


@swapped(token_loop, "choose")
def never_draws(choose):
    return lambda scores, do_sample: choose(scores, False)


@swapped(Run, "record_finished")
def lets_ended_rows_run(record_finished):
    return lambda self, finished: None


MUTATIONS = [
    (skips_the_norms, prepared_never),
    (pays_without_the_norm, prepared_frozen_rows),
    (pays_at_once_with_the_layers_below, prepared_frozen_rows),
    (swaps_queries_and_keys, prepared_never),
    (takes_the_first_layers_input_for_the_last_ones, state_is_the_last_layers),
    (forgets_a_layer, prepared_never),
    (drops_the_source_mask_of_single_rows, prepared_single_rows),
    (drops_the_source_mask_of_single_rows, compiled_prompts),
    (compiles_single_rows_without_their_source_mask, compiled_single_rows),
    (writes_segments_to_the_wrong_rows, compiled_frozen_rows),
    (attends_to_a_position_too_few, compiled_frozen_rows),
    (attends_to_the_first_rows, compiled_frozen_rows),
    (forgets_the_present, compiled_frozen_rows),
    (never_draws, sampling_is_stock),
    (lets_ended_rows_run, ended_rows_rest),
]


@pytest.mark.parametrize("law", dict.fromkeys(law for _, law in MUTATIONS), ids=lambda law: law.__name__)
def test_the_law_holds(law):
    law()


@pytest.mark.parametrize("mutation, law", MUTATIONS, ids=lambda one: one.__name__)
def test_the_law_notices(mutation, law, monkeypatch):
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        law()
