"""The stock model inside an early-exit one, complete or truncated: same weights, same tokens, no exits left."""

from __future__ import annotations

import copy
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from transformers import T5ForConditionalGeneration

from hf_earlyexit import EarlyExitConfig, EarlyExitT5ForConditionalGeneration
from hf_earlyexit.decoding.settings import CERTIFICATE, ExitSettings
from hf_earlyexit.exits.config import HEAD_KINDS
from hf_earlyexit.families.t5.stock import stock_generate, stock_of
from hf_earlyexit.generation.fingerprint import parameter_versions, weights_fingerprint
from tests import laws
from tests.tiny import NUM_LAYERS, tiny_inputs, tiny_pair


@torch.no_grad()
def model_with(heads: str = "linear", family: str = "tied", seed: int = 0, **early_exit):
    """A model with heads other than the logit lens."""
    _, model = tiny_pair(family, seed, early_exit=EarlyExitConfig(heads=heads, **early_exit))
    for parameter in model.exit_heads.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def stock_says(stock, seed: int = 0):
    """As `laws.generate`, through `stock_generate`."""
    return laws.generate(SimpleNamespace(generate=partial(stock_generate, stock)), tiny_inputs(3, seed), seed)


CASES = list(product(HEAD_KINDS, ("tied", "untied", "deeper decoder")))


@pytest.mark.parametrize(("seed", "heads", "family"), [(seed, *case) for seed, case in enumerate(CASES)])
def test_the_cut_decoder_says_what_a_fixed_exit_says(heads, family, seed):
    """Tokens are equal in fp64 at a shallow and the last exit point, and at full depth for the complete decoder."""
    model, said = model_with(heads, family, seed), set()
    for layer in (1, NUM_LAYERS - 1, NUM_LAYERS):
        stock = stock_of(model, layer)
        assert len(stock.decoder.block) == stock.config.num_decoder_layers == layer
        found = stock_says(stock, seed)
        expected = laws.generate(model, tiny_inputs(3, seed), seed, exit_criterion="fixed", exit_layer=layer)
        assert torch.equal(found.sequences, expected.sequences)
        live = expected.layers_run[:, 0] > 0
        torch.testing.assert_close(found.logits[0][live], expected.logits[0][live])
        said.add(str(found.sequences.tolist()))
    assert len(said) > 1, "depth matters"


def test_the_whole_model_is_full_depth():
    model = model_with()
    stock = stock_of(model)
    assert type(stock) is T5ForConditionalGeneration and not stock.training
    assert set(stock.state_dict()) == {name for name in model.state_dict() if not name.startswith("exit_heads.")}
    expected = laws.generate(model, tiny_inputs(3), early_exit=False)
    assert torch.equal(stock_says(stock).sequences, expected.sequences)


def test_nothing_of_the_exits_is_left():
    model = model_with()
    for name, value in {
        "exit_criterion": "softmax",
        "exit_threshold": 0.5,
        "exit_layers": [2],
        "fill": "eager",
    }.items():
        setattr(model.generation_config, name, value)
    setattr(model.generation_config, CERTIFICATE, "exit_certificate.json")
    model.generation_config.max_new_tokens = 7
    for layers in (None, 2):
        stock = stock_of(model, layers)
        left = stock.generation_config.to_dict()
        assert not {*ExitSettings.names(), CERTIFICATE} & set(left) and left["max_new_tokens"] == 7
        assert stock.config.model_type == "t5" and not hasattr(stock.config, "early_exit")
        stock.generation_config.max_new_tokens = 9
    assert model.generation_config.exit_threshold == 0.5 and model.generation_config.max_new_tokens == 7


@pytest.mark.parametrize("layers", (None, 2))
@pytest.mark.parametrize("heads", ("shared", "mlp"))
def test_weights_are_shared_not_copied(heads, layers):
    model = model_with(heads)
    stock = stock_of(model, layers)
    places = {weight.data_ptr() for weight in model.parameters()}
    assert all(weight.data_ptr() in places for weight in stock.state_dict().values())
    before = stock_says(stock).sequences
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    expected = laws.generate(model, tiny_inputs(3), exit_criterion="fixed", exit_layer=layers or NUM_LAYERS)
    found = stock_says(stock).sequences
    assert torch.equal(found, expected.sequences) and not torch.equal(found, before)


@pytest.mark.parametrize("heads", ("shared", "norm"))
def test_the_model_is_left_as_it_is(heads):
    """The model is unchanged even if the stock model is moved and the model is in training mode."""
    model = model_with(heads).train()
    generation = copy.deepcopy(model.generation_config.to_dict())
    weights, marks, config = (
        weights_fingerprint(model),
        parameter_versions(model),
        copy.deepcopy(model.config.to_dict()),
    )
    for layers in (None, 2):
        stock = stock_of(model, layers)
        assert not any(module.training for module in stock.modules())
        stock.to(torch.bfloat16)
        assert {weight.dtype for weight in stock.parameters()} == {torch.bfloat16}
    assert weights_fingerprint(model) == weights and parameter_versions(model) == marks
    assert model.config.to_dict() == config and model.generation_config.to_dict() == generation
    assert all(module.training for module in model.modules())


def test_attention_is_the_models():
    model = model_with()
    assert stock_of(model).config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert stock_of(model, 2).decoder.config._attn_implementation == "eager"


def test_only_exit_points_can_be_cut_at():
    model = model_with(exit_layers=(2, 4))
    for layers in (2, 4, 6):
        assert len(stock_of(model, layers).decoder.block) == layers
    for layers in (0, 3, 7):
        with pytest.raises(ValueError, match=rf"`layers={layers}` is no exit point: \[2, 4, 6\] are"):
            stock_of(model, layers)


def test_it_is_saved_as_plain_t5(tmp_path):
    model = model_with("mlp", "untied")
    model.save_stock(tmp_path)
    again, info = T5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert weights_fingerprint(again) == weights_fingerprint(stock_of(model))
    assert torch.equal(stock_says(again.eval()).sequences, stock_says(stock_of(model)).sequences)


# Fingerprints


def test_fingerprints_are_of_the_weights(tmp_path):
    model = model_with()
    weights = weights_fingerprint(model)
    assert len(weights) == 64 and weights_fingerprint(copy.deepcopy(model)) == weights
    model.save_pretrained(tmp_path)
    assert weights_fingerprint(EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path)) == weights
    assert weights_fingerprint(model_with(seed=1)) != weights
    block = model.decoder.block[0].layer[0].SelfAttention
    with torch.no_grad():
        block.k.weight[3, 5] += 1e-12
        assert weights_fingerprint(model) != weights
        block.k.weight[3, 5] -= 1e-12
        block.q.weight, block.k.weight = block.k.weight, block.q.weight
    assert weights_fingerprint(model) != weights, "the same numbers in other places"


def test_names_count_and_their_order_does_not():
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    found = [
        weights_fingerprint(torch.nn.ModuleDict(modules))
        for modules in ({"a": one, "b": other}, {"b": other, "a": one}, {"a": one, "c": other})
    ]
    assert found[0] == found[1] != found[2]


def test_heads_and_buffers_count():
    module = torch.nn.BatchNorm1d(3)
    before, marks = weights_fingerprint(module), parameter_versions(module)
    module.running_mean.add_(1)
    assert weights_fingerprint(module) != before and parameter_versions(module) != marks
    model = model_with()
    before = weights_fingerprint(model)
    with torch.no_grad():
        model.exit_heads.heads["1"].map.weight[0, 0] += 1
    assert weights_fingerprint(model) != before


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_read_in_fp32_has_the_same_fingerprint(dtype):
    half = model_with().to(dtype)
    assert weights_fingerprint(copy.deepcopy(half).float()) == weights_fingerprint(half)
    assert weights_fingerprint(model_with().float()) != weights_fingerprint(half), "rounding is a change"


def test_marks_change_when_weights_may_have():
    model = model_with()
    marks = parameter_versions(model)
    laws.generate(model, tiny_inputs(2), exit_criterion="fixed", exit_layer=2)
    assert parameter_versions(model) == marks, "reading changes nothing"
    changes = (
        lambda: model.load_state_dict(model.state_dict()),
        lambda: model.exit_heads.heads["2"].norm.weight.detach().mul_(2),
        lambda: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight.detach().clone())),
        lambda: model.to(torch.float32),
    )
    for number, change in enumerate(changes):
        with torch.no_grad():
            change()
        assert parameter_versions(model) != marks, f"change {number}"
        marks = parameter_versions(model)
    with torch.inference_mode():
        made = model_with()
    assert parameter_versions(made) == parameter_versions(made), "no count, and no error"
