"""Padding in the source: every implementation of the decoder equals the stock model under any mask.

Laws 1, 3 and 4 over {plain, prepared, compiled} x {one row, padded or not; rows padded differently} x {with and
without a decoder prompt}. All implementations are compared with the same stock model and the same slow reference, to
the tolerance of fp64, so law 11 (prepared = compiled = plain) follows.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import CompileConfig

from hf_earlyexit import EarlyExitConfig
from hf_earlyexit.families.t5.prepared import PreparedT5Decoder
from tests import laws
from tests.reference import frozen_row_generate
from tests.tiny import ENDS, VOCABULARY, tiny_pair, unrest
from tests.watching import Scripted, pseudo_random_script


LENGTH = 9
NEW_TOKENS = 7
EXIT_LAYERS = (2, 4)  # of 6, so that all segments share a graph
WAYS = ("plain", "prepared", "compiled")
MASKS = {
    "full": [1, 1, 1, 1, 1, 1, 1, 1, 1],
    "right": [1, 1, 1, 1, 1, 0, 0, 0, 0],
    "left": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "holes": [1, 0, 0, 1, 1, 0, 1, 1, 0],
}
SOURCES = {**{name: [mask] for name, mask in MASKS.items()}, "batch": list(MASKS.values())}
COMPILED = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager")}


@functools.cache
def models() -> dict:
    """The stock model, and by implementation the early-exit model, all with the same weights."""
    torch._dynamo.reset()
    stock, plain = tiny_pair("untied", 1, early_exit=EarlyExitConfig(EXIT_LAYERS))
    prepared = copy.copy(plain).prepare_for_generation()
    return {"stock": stock, "plain": plain, "prepared": prepared, "compiled": prepared}


def source_of(name: str) -> dict[str, torch.Tensor]:
    """Padding positions hold ordinary token ids, which would change the output if they were not masked."""
    mask = torch.tensor(SOURCES[name])
    row = torch.randint(4, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(5))
    return {"input_ids": (row + torch.arange(len(mask))[:, None]) % VOCABULARY, "attention_mask": mask}


def prompt_of(rows: int, prompted: bool) -> dict[str, torch.Tensor]:
    """A decoder prompt for each row, different after the start token; empty without prompts."""
    if not prompted:
        return {}
    return {"decoder_input_ids": torch.tensor([[0, 5 + row, 9 + row, 14 + row] for row in range(rows)])}


def options_of(way: str) -> dict:
    return COMPILED if way == "compiled" else {}


@functools.cache
def stock_says(name: str, prompted: bool):
    source = source_of(name)
    call = source | prompt_of(len(source["input_ids"]), prompted)
    return laws.stock_generate(models()["stock"], call, max_new_tokens=NEW_TOKENS)


def script(row: int, position: int) -> int:
    """A script with exits after layers 2, 4 and 6."""
    return 2 * pseudo_random_script(2, 3)(row, position)


@functools.cache
def reference_says(name: str, prompted: bool):
    source = source_of(name)
    prompt = prompt_of(len(source["input_ids"]), prompted).get("decoder_input_ids")
    return frozen_row_generate(models()["stock"], source, script, NEW_TOKENS, unrest(), tuple(ENDS), prompt_ids=prompt)


# --- the laws, each as a function that mutations call, too ----------------------------------------------------------


def full_depth_is_stock(way: str, name: str, prompted: bool = False) -> None:
    """Law 1: full depth equals the stock model."""
    source, expected = source_of(name), stock_says(name, prompted)
    call = source | prompt_of(len(source["input_ids"]), prompted)
    output = laws.generate(models()[way], call, max_new_tokens=NEW_TOKENS, **options_of(way))
    assert torch.equal(output.sequences, expected.sequences)
    live = output.layers_run > 0
    for step, (ours, stocks) in enumerate(zip(output.logits, expected.logits)):
        torch.testing.assert_close(ours[live[:, step]], stocks[live[:, step]])


def exits_follow_the_reference(way: str, name: str, prompted: bool = False):
    """Law 4 under a script: lazy, eager and the slow reference with frozen rows are equal."""
    source, (sequences, logits) = source_of(name), reference_says(name, prompted)
    call = source | prompt_of(len(source["input_ids"]), prompted)
    for fill in ("lazy", "eager"):
        exits = {"exit_criterion": Scripted(script), "exit_threshold": 0.5, "fill": fill}
        output = laws.generate(models()[way], call, max_new_tokens=NEW_TOKENS, **exits, **options_of(way))
        assert torch.equal(output.sequences, sequences)
        live = output.layers_run > 0
        for step, ours in enumerate(output.logits):
            torch.testing.assert_close(ours[live[:, step]], logits[live[:, step], step].float())
    return output


def rows_say_the_same_alone(way: str, prompted: bool = False) -> None:
    """Law 3: each row of a batch equals the row alone with its padding."""
    source = source_of("batch")
    call = source | prompt_of(len(MASKS), prompted)
    exits = {"exit_criterion": "state", "exit_threshold": 0.85, "max_new_tokens": NEW_TOKENS, **options_of(way)}
    batch = laws.generate(models()[way], call, **exits)
    for row in range(len(MASKS)):
        alone = laws.generate(models()[way], {name: part[row : row + 1] for name, part in call.items()}, **exits)
        steps = alone.layers_run.shape[1]
        assert (
            torch.equal(batch.layers_run[row, :steps], alone.layers_run[0]) and not batch.layers_run[row, steps:].any()
        )
        assert torch.equal(batch.sequences[row, : alone.sequences.shape[1]], alone.sequences[0])
    assert {*batch.layers_run.flatten().tolist()} >= {2, 4, 6}, "tokens left at fewer than three layers"


# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompted", [False, True], ids=["no prompt", "prompt"])
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("way", WAYS)
def test_full_depth_is_stock(way, name, prompted):
    full_depth_is_stock(way, name, prompted)


@pytest.mark.parametrize("prompted", [False, True], ids=["no prompt", "prompt"])
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("way", WAYS)
def test_exits_follow_the_reference(way, name, prompted):
    output = exits_follow_the_reference(way, name, prompted)
    assert len({*output.layers_run.flatten().tolist()} - {0}) >= 2
    if name == "batch":
        laws.assert_not_vacuous(output)
        assert laws.longest_debt(output.layers_run, 6) >= 2


@pytest.mark.parametrize("prompted", [False, True], ids=["no prompt", "prompt"])
@pytest.mark.parametrize("way", WAYS)
def test_rows_say_the_same_alone(way, prompted):
    rows_say_the_same_alone(way, prompted)


@pytest.mark.parametrize("name", ["right", "left", "holes"])
def test_the_masks_matter(name):
    """The stock model's output differs without the mask, so these tests detect a dropped mask."""
    source = source_of(name)
    source["attention_mask"] = torch.ones_like(source["attention_mask"])
    unmasked = laws.stock_generate(models()["stock"], source, max_new_tokens=NEW_TOKENS)
    assert not torch.allclose(unmasked.logits[0], stock_says(name, False).logits[0], atol=0.1)


def test_padding_is_looked_for_once_per_call(monkeypatch):
    """The mask is inspected once per call, since each inspection waits for the device."""
    model, asked, as_bool = models()["prepared"], [], torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: asked.append(tensor) or as_bool(tensor))
    for name in ("full", "right"):
        source = source_of(name)
        states = torch.zeros(1, LENGTH, model.config.d_model, dtype=model.dtype)
        cache = model._cache_for(None, states, 4, "lazy")
        cache.attach_encoder(states)
        asked.clear()
        decoder = PreparedT5Decoder(model._prepared_copy.weights, model, cache, source["attention_mask"], None)
        assert len(asked) == 1 and decoder.pads_source == (name != "full")
