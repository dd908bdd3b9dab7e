"""Skipped layers: a row's outputs equal those of a model without these layers, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from hf_earlyexit.training.layer_dropout import layer_dropout
from tests.tiny import NUM_LAYERS, tiny_inputs, tiny_stock


ROWS = 4
LEFT_OUT = {2: [1, 3], 4: [0, 1, 2, 3], 5: [3]}  # skipped rows by layer


def states(model, rows=slice(None)) -> list[torch.Tensor]:
    """The decoder's hidden states after each layer, in training mode with dropout 0."""
    inputs = {name: tensor[rows] for name, tensor in tiny_inputs(ROWS).items()}
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(4, 20, (ROWS, 5), generator=generator)[rows]
    return list(model(**inputs, labels=labels, output_hidden_states=True, use_cache=False).decoder_hidden_states)


@pytest.fixture
def model():
    return tiny_stock(seed=0, dtype=torch.float64, dropout_rate=0.0).train()


@pytest.fixture
def chosen(monkeypatch):
    """Make `torch.rand` skip the rows of `LEFT_OUT`, at a rate of 1/2."""
    draws = iter([LEFT_OUT.get(layer, []) for layer in range(2, NUM_LAYERS + 1)])

    def draw(count):
        rows = next(draws)
        return torch.tensor([0.0 if row in rows else 0.9 for row in range(count)])

    monkeypatch.setattr(torch, "rand", draw)


def test_a_row_that_skips_layers_is_the_row_of_a_model_without_them(model, chosen):
    with layer_dropout(model.decoder.block) as dropout:
        dropout.rates = [0.0] + [0.5] * (NUM_LAYERS - 1)
        found = states(model)[-1]
    for row in range(ROWS):
        left_out = {layer for layer, rows in LEFT_OUT.items() if row in rows}
        assert left_out, "each row skips something"
        blocks = model.decoder.block
        model.decoder.block = torch.nn.ModuleList(
            block for layer, block in enumerate(blocks, start=1) if layer not in left_out
        )
        expected = states(model, slice(row, row + 1))[-1][0]
        model.decoder.block = blocks
        torch.testing.assert_close(found[row], expected)


def test_skipped_rows_are_not_computed(model, chosen):
    seen = []
    for block in model.decoder.block:
        block.layer[-1].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    with layer_dropout(model.decoder.block) as dropout:
        dropout.rates = [0.0] + [0.5] * (NUM_LAYERS - 1)
        states(model)
    assert seen == [4, 2, 4, 3, 4], "layer 4 does not run at all"


def test_rates_are_kept():
    """Each layer skips its share of 4,000 rows; the binomial's standard deviation is 0.008 at most."""
    model = tiny_stock(seed=0, dtype=torch.float32, dropout_rate=0.0).train()
    rates = [0.0, 0.1, 0.3, 0.5, 0.7, 1.0]
    seen = []
    for block in model.decoder.block:
        block.layer[-1].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    rows = {"input_ids": torch.full((4000, 2), 5), "labels": torch.full((4000, 1), 5)}
    torch.manual_seed(0)
    with layer_dropout(model.decoder.block) as dropout, torch.no_grad():
        dropout.rates = rates
        model(**rows, use_cache=False)
    assert [1 - count / 4000 for count in seen] == pytest.approx(rates[:-1], abs=0.03), "all left the last one out"


def test_gradients_flow_through_and_checkpointing_changes_nothing(model):
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        with layer_dropout(model.decoder.block) as dropout:
            dropout.rates = [0.0] + [0.5] * (NUM_LAYERS - 1)
            states(model)[-1].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.decoder.block[0].parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_only_in_training_and_only_inside(model):
    expected = states(model.eval())[-1]
    with layer_dropout(model.decoder.block) as dropout:
        dropout.rates = [0.0] + [1.0] * (NUM_LAYERS - 1)
        torch.testing.assert_close(states(model)[-1], expected)
        assert not torch.equal(states(model.train())[-1], expected)
    torch.testing.assert_close(states(model)[-1], expected)
    assert not any("forward" in vars(block) for block in model.decoder.block)


def test_a_forward_that_was_there_before_comes_back(model):
    block = model.decoder.block[2]
    block.forward = own = block.forward
    with layer_dropout(model.decoder.block):
        assert vars(block)["forward"] is not own
    assert vars(block)["forward"] is own
