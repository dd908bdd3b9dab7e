"""Changes of modules and settings drop a prepared copy; made before preparing, they are refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from hf_earlyexit import EarlyExitConfig
from tests import laws
from tests.tiny import tiny_inputs, tiny_pair


CALL = {"exit_criterion": "fixed", "exit_layer": 3, "max_new_tokens": 4}


def model_with_heads():
    return tiny_pair("tied", 1, early_exit=EarlyExitConfig(heads="norm"))[1]


class TwiceAsLoud(nn.Linear):
    def forward(self, states):
        return 2 * super().forward(states)


def replace_an_activation(model):
    model.decoder.block[1].layer[2].DenseReluDense.act = nn.Tanh()


def replace_a_map_on_the_same_weight(model):
    attention = model.decoder.block[1].layer[0].SelfAttention
    weight, attention.o = attention.o.weight, TwiceAsLoud(32, 32, bias=False)
    attention.o.weight = weight


def replace_a_forward(model):
    feed = model.decoder.block[0].layer[2]
    feed.forward = lambda states: 0.5 * type(feed).forward(feed, states)


def replace_the_heads_forward(model):
    head = model.exit_heads.heads["3"]
    head.forward = lambda states: 2 * type(head).forward(head, states)


def flip_the_scale(model):
    model.config.scale_decoder_outputs = not model.config.scale_decoder_outputs


def raise_an_epsilon(model):
    model.decoder.block[1].layer[0].layer_norm.variance_epsilon = 5.0


def swap_two_layers(model):
    blocks = list(model.decoder.block)
    blocks[0].layer[2], blocks[1].layer[2] = blocks[1].layer[2], blocks[0].layer[2]


def let_a_part_drop_out(model):
    model.decoder.block[0].layer[2].train()


CHANGES = [
    replace_an_activation,
    replace_a_map_on_the_same_weight,
    replace_a_forward,
    replace_the_heads_forward,
    flip_the_scale,
    raise_an_epsilon,
    swap_two_layers,
]


# --- the law --------------------------------------------------------------------------------------------------------


def a_copy_goes_with_what_it_was_made_of(change) -> None:
    """Law 11 after a change: `generate` gives the changed model's output, and warns that the copy is dropped."""
    model = model_with_heads().prepare_for_generation()
    before = laws.generate(model, tiny_inputs(2), **CALL)
    change(model)
    plain = copy.copy(model)
    plain.unprepare()
    expected = laws.generate(plain, tiny_inputs(2), **CALL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = laws.generate(model, tiny_inputs(2), **CALL)
    torch.testing.assert_close(output.logits[0], expected.logits[0])
    assert not torch.allclose(before.logits[0], expected.logits[0], atol=1e-3), "the change changes nothing"
    assert not model.is_prepared and sum("since `prepare_for_generation`" in str(one.message) for one in caught) == 1


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.__name__)
def test_a_copy_goes_with_what_it_was_made_of(change):
    a_copy_goes_with_what_it_was_made_of(change)


def test_a_class_whose_forward_is_replaced(monkeypatch):
    model = model_with_heads().prepare_for_generation()
    attention = type(model.decoder.block[0].layer[0])
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs))
    with pytest.warns(UserWarning, match="Modules or settings of the decoder have changed"):
        laws.generate(model, tiny_inputs(2), **CALL)


@pytest.mark.parametrize("change", [replace_a_map_on_the_same_weight, replace_a_forward], ids=lambda one: one.__name__)
def test_compiled_calls_are_refused(change, monkeypatch):
    """Compiled calls need a prepared copy, and none can be made."""
    model = model_with_heads().prepare_for_generation()
    change(model)
    monkeypatch.setattr(model.encoder, "forward", None)
    with pytest.raises(ValueError, match="`prepare_for_generation` (needs the plain|would not call|would bypass)"):
        laws.generate(model, tiny_inputs(2), **CALL, cache_implementation="static")
    assert not model.is_prepared


class OwnNorm(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight, self.eps = weight, 1e-6

    def forward(self, states):
        return states


def replace_a_norm(model):
    part = model.decoder.block[1].layer[1]
    part.layer_norm = OwnNorm(part.layer_norm.weight)


def replace_a_norm_by_torchs(model):
    """A norm that also has a scale and an `eps`, but subtracts the mean."""
    part = model.decoder.block[1].layer[1]
    part.layer_norm = nn.LayerNorm(32, bias=False, dtype=torch.float64)


def wrap_a_heads_norm(model):
    model.exit_heads.heads["2"].norm = nn.Sequential(model.exit_heads.heads["2"].norm)


@pytest.mark.parametrize(
    "change, message",
    [
        (replace_a_forward, r"the replaced `forward` of `decoder.block.0.layer.2`: remove it"),
        (replace_the_heads_forward, r"the replaced `forward` of `exit_heads.heads.3`"),
        (replace_a_norm, r"would not call `decoder.block.1.layer.1.layer_norm`, a `OwnNorm`"),
        (
            replace_a_norm_by_torchs,
            r"would not call `decoder.block.1.layer.1.layer_norm`, a `LayerNorm`: use",
        ),
        (wrap_a_heads_norm, r"would not call `exit_heads.heads.2.norm`, a `Sequential`"),
        (let_a_part_drop_out, r"needs eval mode, `decoder.block.0.layer.2` is not"),
    ],
)
def test_what_would_not_be_called_is_refused(change, message):
    model = model_with_heads()
    change(model)
    with pytest.raises(ValueError, match=message):
        model.prepare_for_generation()


def test_hooks_of_exit_norms_are_hooks():
    model = model_with_heads()
    model.exit_heads.heads["3"].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="would not call the hooks of `exit_heads.heads.3`"):
        model.prepare_for_generation()


def test_what_is_called_may_be_anything_before():
    """Modules that a copy still calls, such as an activation, may be replaced before preparing."""
    model = model_with_heads()
    replace_an_activation(model)
    expected = laws.generate(model, tiny_inputs(2), **CALL)
    output = laws.generate(model.prepare_for_generation(), tiny_inputs(2), **CALL)
    torch.testing.assert_close(output.logits[0], expected.logits[0])
