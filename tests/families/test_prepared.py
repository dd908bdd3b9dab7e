"""A prepared copy computes what the model computes, is valid while weights are unchanged, and is not model state."""

from __future__ import annotations

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers.models.t5.modeling_t5 import T5Block

from hf_earlyexit import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.families.t5.prepared import PreparedT5Decoder
from hf_earlyexit.kernels import packing
from hf_earlyexit.kernels.kernel_switch import SWITCH
from hf_earlyexit.kernels.packing import ROW_TILE, PackedLinear, at_least_a_tile
from tests import laws
from tests.tiny import ENDS, FAMILIES, NUM_LAYERS, tiny_inputs, tiny_pair
from tests.watching import pseudo_random_script


SOFTMAX = {"exit_criterion": "softmax", "exit_threshold": 0.1}


def prepared_pair(family: str = "untied", seed: int = 0, dtype=torch.float64, **changes):
    stock, model = tiny_pair(family, seed, dtype, **changes)
    return stock, model.prepare_for_generation()


@pytest.fixture(autouse=True)
def stock_blocks_rest(monkeypatch):
    """Fails a test in which an early-exit model runs the library's blocks; stock models may."""

    def run_block(*args):
        raise AssertionError("a block that was not prepared ran")

    monkeypatch.setattr("hf_earlyexit.families.t5.decoder.T5Decoder.run_block", run_block)


@pytest.fixture
def kernels_on(monkeypatch):
    """Enables the optional kernels, even where the tests are run without them."""
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)


@pytest.fixture
def packs_all(monkeypatch, kernels_on):
    """Small weights are packed, too."""
    monkeypatch.setattr(packing, "SMALLEST_PACKED", 0)


# --- the laws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_never_is_stock(family, options):
    for seed in (0, 1):
        stock, model = prepared_pair(family, seed)
        torch.manual_seed(seed)
        expected = laws.stock_generate(stock, tiny_inputs(4, seed), seed, **options)
        torch.manual_seed(seed)
        output = laws.generate(model, tiny_inputs(4, seed), seed, **options)
        assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.parametrize("layer", [1, 3, 5])
def test_fixed_exits_are_the_cut_stock_model(layer):
    laws.fixed_exit_equals_cut_stock(*prepared_pair(seed=1), tiny_inputs(4, 1), layer, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_scripts_follow_frozen_rows(family):
    for seed in (0, 1):
        stock, model = prepared_pair(family, seed)
        script = pseudo_random_script(seed, NUM_LAYERS)
        for output in laws.follows_frozen_rows(stock, model, tiny_inputs(4, seed), script, seed):
            laws.assert_not_vacuous(output)
            assert laws.longest_debt(output.layers_run, NUM_LAYERS) >= 2


@pytest.mark.parametrize("criterion, threshold", [("softmax", 0.08), ("state", 0.75), ("patience", 0.5)])
def test_criteria_follow_frozen_rows(criterion, threshold):
    stock, model = prepared_pair(seed=1)
    output = laws.exits_replayed_follow_frozen_rows(stock, model, tiny_inputs(4, 1), criterion, threshold)
    laws.assert_not_vacuous(output)


def test_padded_prompts_are_those_of_stock():
    prompt = {
        "decoder_input_ids": torch.tensor([[0, 5, 9, 4], [1, 0, 7, 8], [1, 1, 0, 6], [0, 3, 2, 2]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    stock, model = prepared_pair()
    expected = laws.stock_generate(stock, tiny_inputs(4) | prompt)
    assert torch.equal(laws.generate(model, tiny_inputs(4) | prompt).sequences, expected.sequences)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_say_what_they_say_alone(dtype, packs_all):
    """Packed products round each row as if alone, so a batch equals its rows exactly if attention does so, too."""
    _, model = prepared_pair(seed=2, dtype=dtype)
    packs = model._prepared_copy.weights.layers[0].query_keys_values.is_packed
    assert packs == packing.multiplies_packed(dtype)
    output = laws.scripted_batch_equals_rows_alone(model, 2)
    laws.assert_not_vacuous(output)


def test_prepared_is_the_unprepared_up_to_ties(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(packing, "SMALLEST_PACKED", 0)
    _, model = tiny_pair("untied", 2, torch.float32)
    inputs = tiny_inputs(8, 2)
    plain = laws.generate(model, inputs, 2, **SOFTMAX)
    output = laws.generate(model.prepare_for_generation(), inputs, 2, **SOFTMAX)
    assert torch.equal(plain.sequences, output.sequences) and torch.equal(plain.layers_run, output.layers_run)
    for mine, others in zip(output.logits, plain.logits):
        torch.testing.assert_close(mine, others, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fill", ["lazy", "eager"])
def test_work_is_counted_where_it_runs(fill, monkeypatch):
    counts = {"block": [0] * NUM_LAYERS, "paid": [0] * NUM_LAYERS, "head": 0}

    class Counting(PreparedT5Decoder):
        def self_attention(self, layer, states, rows, cache):
            counts["block"][layer - 1] += len(rows) * self.new_positions
            return super().self_attention(layer, states, rows, cache)

        def project(self, layer, states):
            counts["paid"][layer - 1] += len(states)
            return super().project(layer, states)

        def project_layers(self, layers, states):
            for layer in layers:
                counts["paid"][layer - 1] += len(states)
            return super().project_layers(layers, states)

        def lm_head(self, head_input):
            counts["head"] += len(head_input)
            return super().lm_head(head_input)

    monkeypatch.setattr(EarlyExitT5ForConditionalGeneration, "prepared_adapter", Counting)
    _, model = prepared_pair()
    output = laws.generate(model, tiny_inputs(4), **SOFTMAX, fill=fill)
    assert output.layer_rows.tolist() == counts["block"]
    assert output.filled_positions.tolist() == counts["paid"]
    assert output.head_rows.sum() == counts["head"]
    laws.assert_not_vacuous(output)


# --- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 33])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_packed_product_is_the_product(rows, dtype, packs_all):
    weight, states = torch.randn(24, 40, dtype=dtype), torch.randn(rows, 40, dtype=dtype)
    product = PackedLinear(weight)(at_least_a_tile(states))
    assert product.shape == (max(rows, ROW_TILE), 24)
    torch.testing.assert_close(product[:rows], nn.functional.linear(states, weight))
    assert not product[rows:].any()


# --- when there is a copy -------------------------------------------------------------------------------------------


def test_small_weights_are_left_as_they_are(kernels_on):
    small, large = torch.randn(64, 64), torch.randn(256, 256)
    assert not PackedLinear(small).is_packed and PackedLinear(small).weight.data_ptr() == small.data_ptr()
    assert PackedLinear(large).is_packed


def test_the_copy_is_no_part_of_the_model(tmp_path, packs_all):
    _, model = tiny_pair("untied", 0, torch.float32)
    names = list(model.state_dict())
    assert model.prepare_for_generation() is model and model.is_prepared
    assert list(model.state_dict()) == names
    assert not copy.deepcopy(model).is_prepared and not pickle.loads(pickle.dumps(model)).is_prepared
    assert copy.copy(model).is_prepared, "an alias shares the weights"
    model.save_pretrained(tmp_path)
    assert not model.is_prepared
    assert not EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path).is_prepared


@pytest.mark.parametrize(
    "change",
    [lambda model: model.train(), lambda model: model.to(torch.float64), lambda model: model.unprepare()],
    ids=["train", "to", "unprepare"],
)
def test_what_drops_it(change):
    _, model = prepared_pair(dtype=torch.float32)
    model.eval()
    assert model.is_prepared, "eval mode is what it is for"
    change(model)
    assert not model.is_prepared


def test_other_weights_drop_it_with_a_warning(monkeypatch):
    monkeypatch.undo()
    stock, model = prepared_pair()
    with torch.no_grad():
        for one in (stock, model):
            one.decoder.block[2].layer[0].SelfAttention.q.weight.mul_(-1)
    expected = laws.stock_generate(stock, tiny_inputs(4))
    with pytest.warns(UserWarning, match="Weights have changed since `prepare_for_generation`.*call it again"):
        output = laws.generate(model, tiny_inputs(4))
    assert torch.equal(output.sequences, expected.sequences) and not model.is_prepared
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        laws.generate(model.prepare_for_generation(), tiny_inputs(4))


def test_hooks_that_come_later_drop_it_with_a_warning(monkeypatch):
    monkeypatch.undo()
    _, model = prepared_pair()
    seen = []
    model.lm_head.register_forward_hook(lambda *args: seen.append(1))
    with pytest.warns(UserWarning, match="Hooks were added since `prepare_for_generation`"):
        laws.generate(model, tiny_inputs(2))
    assert seen and not model.is_prepared


def test_the_librarys_recorders_are_no_hooks_that_matter():
    """The library's recorders stay on the blocks once hidden states were requested, and the copy stays valid."""
    _, model = tiny_pair("tied", 0)
    ids = tiny_inputs(2)["input_ids"]
    model(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True)
    assert model.decoder.block[0]._forward_hooks
    assert model.prepare_for_generation().is_prepared


def test_under_autocast(packs_all):
    """Under autocast, attention runs in half precision and packed products keep their dtype."""
    _, model = prepared_pair(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = laws.generate(model, tiny_inputs(4), exit_criterion="fixed", exit_layer=3)
    assert set(output.layers_run[output.layers_run > 0].tolist()) == {3}


def test_threads_share_a_copy():
    _, model = prepared_pair()
    inputs = [tiny_inputs(4, seed) for seed in range(4)]
    expected = [laws.generate(model, one, **SOFTMAX).sequences for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: laws.generate(model, one, **SOFTMAX).sequences, inputs * 3))
    for sequences, others in zip(found, expected * 3):
        assert torch.equal(sequences, others)


class LoraLinear(nn.Linear):
    pass


def replace_a_map(model):
    model.decoder.block[1].layer[0].SelfAttention.v = LoraLinear(32, 32, bias=False)


def hook_a_block(model):
    model.decoder.block[1].register_forward_hook(lambda *args: None)


@pytest.mark.parametrize(
    "change, message",
    [
        (replace_a_map, r"`decoder.block.1.layer.0.SelfAttention.v` is a `LoraLinear`.*: merge adapters"),
        (hook_a_block, r"hooks of `decoder.block.1`: remove them"),
        (lambda model: model.half(), "does not work in fp16.*use `torch.bfloat16`"),
        (lambda model: model.lm_head.double(), "several dtypes, found .*float32.*float64"),
        (lambda model: model.train(), "needs eval mode: call `model.eval"),
    ],
)
@pytest.mark.parametrize("asks", ["prepare_for_generation", "generate"])
def test_what_cannot_be_prepared_is_refused(change, message, asks, monkeypatch):
    _, model = tiny_pair("untied", 0, torch.float32)
    change(model)
    monkeypatch.setattr(model.encoder, "forward", None)
    with pytest.raises(ValueError, match=message if asks[0] == "p" or not model.training else "training mode"):
        if asks == "generate":
            model.generate(**tiny_inputs(2), max_new_tokens=3, cache_implementation="static", **SOFTMAX)
        else:
            model.prepare_for_generation()
    assert not model.is_prepared


def test_stock_blocks_are_left_alone():
    """The fixture `stock_blocks_rest` detects a block of the library."""
    assert T5Block.forward.__module__ == "transformers.models.t5.modeling_t5"
    with pytest.raises(AssertionError, match="was not prepared"):
        tiny_pair()[1].generate(**tiny_inputs(1), max_new_tokens=2, eos_token_id=ENDS)
