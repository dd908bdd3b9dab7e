"""The laws on a device: every implementation of the decoder, dtype (fp32, bf16), decoding mode and kind of padding.

Decoding modes are greedy, beams and sampling. Runs on a GPU with `pytest -m gpu`, and on a CPU with all tests.
"""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from transformers import CompileConfig

from hf_earlyexit import ClassifierConfig, EarlyExitConfig
from hf_earlyexit.exits.criteria import ExitClassifier, SoftmaxResponse, StateSimilarity
from hf_earlyexit.families.t5 import compiled as t5_compiled
from hf_earlyexit.families.t5 import decoder as t5
from tests import laws
from tests.teacher_forced import (
    Watched,
    allowance,
    assert_exits,
    assert_greedy,
    assert_logits,
    beam_scores,
    distance,
    stock_logits,
    walked_logits,
)
from tests.tiny import NUM_LAYERS, cut_to, one_row, tiny_inputs, tiny_pair
from tests.watching import Scripted, pseudo_random_script, threshold_for


pytestmark = pytest.mark.gpu

SEED, NEW_TOKENS, DEPTHS = 2, 10, (2, 4, NUM_LAYERS)
EXITS = EarlyExitConfig(DEPTHS[:-1], classifier=ClassifierConfig(trained=True))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DECODING = {"greedy": {}, "beams": {"num_beams": 3}, "sampling": {"do_sample": True}}
CRITERIA = {"softmax": SoftmaxResponse(), "state": StateSimilarity(), "classifier": ExitClassifier()}
CONFIDENCE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps}

ways = pytest.mark.parametrize("way", ["plain", "prepared", "compiled"])
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


# --- models and inputs ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def pair(dtype: torch.dtype, device: torch.device):
    return tiny_pair("untied", SEED, dtype, EXITS, device=device)


@lru_cache(maxsize=4)
def exact_pair(dtype: torch.dtype, device: torch.device):
    """The models with the same weights in at least fp32."""
    if dtype == torch.float32:
        return pair(dtype, device)
    return tuple(copy.deepcopy(one).float() for one in pair(dtype, device))


@lru_cache(maxsize=8)
def model_of(way: str, dtype: torch.dtype, device: torch.device):
    model = copy.copy(pair(dtype, device)[1])
    return model if way == "plain" else model.prepare_for_generation()


def settings_of(way: str, device: torch.device) -> dict:
    """Keywords that select the implementation; graphs use eager kernels to save time."""
    if way != "compiled":
        return {}
    if device.type == "cuda":
        return {"cache_implementation": "static", "disable_compile": True}
    return {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager")}


def padded_left(inputs: dict[str, torch.Tensor], by: int = 4) -> dict[str, torch.Tensor]:
    return {name: torch.nn.functional.pad(tensor, (by, 0)) for name, tensor in inputs.items()}


def padded_right(inputs: dict[str, torch.Tensor], by: int = 4) -> dict[str, torch.Tensor]:
    return {name: torch.nn.functional.pad(tensor, (0, by)) for name, tensor in inputs.items()}


SOURCES = {
    "alone": lambda device: one_row(tiny_inputs(4, SEED, device=device), 1),
    "padded right": lambda device: padded_right(one_row(tiny_inputs(4, SEED, device=device), 2)),
    "padded left": lambda device: padded_left(one_row(tiny_inputs(4, SEED, device=device), 1)),
    "batch": lambda device: tiny_inputs(4, SEED, device=device),
}
sources = pytest.mark.parametrize("source", SOURCES)


@pytest.fixture(autouse=True)
def all_rows(monkeypatch, device):
    """On a CPU, compiled segments are used for any number of rows, as on an accelerator, and with few graphs."""
    if device.type == "cpu":
        monkeypatch.setattr(t5_compiled, "LONGEST_SEGMENT", 2)
        monkeypatch.setattr(t5_compiled, "bucket", lambda rows: 4 if rows <= 4 else 16)
        monkeypatch.setattr(t5_compiled, "most_rows", lambda cache: cache.num_rows)


def generate(way: str, dtype: torch.dtype, device: torch.device, inputs, **settings):
    """Call `generate` of an early-exit model, and check that it did not fall back to the library."""
    torch.manual_seed(SEED)
    model, settings = model_of(way, dtype, device), settings | settings_of(way, device)
    output = laws.generate(model, inputs, SEED, NEW_TOKENS, **settings)
    assert output.layers_run is not None
    return output


@lru_cache(maxsize=64)
def stock_output(dtype: torch.dtype, device: torch.device, decoding: str, source: str):
    torch.manual_seed(SEED)
    call = {"max_new_tokens": NEW_TOKENS, **DECODING[decoding]}
    return laws.stock_generate(pair(dtype, device)[0], SOURCES[source](device), SEED, **call)


# --- full depth -----------------------------------------------------------------------------------------------------


def never_is_stock(way, dtype, device, decoding, source):
    inputs, (stock, _), (exact, _) = SOURCES[source](device), pair(dtype, device), exact_pair(dtype, device)
    output = generate(way, dtype, device, inputs, **DECODING[decoding])
    if dtype == torch.float32 and decoding != "greedy":
        assert torch.equal(output.sequences, stock_output(dtype, device, decoding, source).sequences)
    allowed = allowance(stock, exact, inputs, output.sequences)
    if decoding == "beams":
        expected = beam_scores(stock_logits(exact, inputs, output.sequences), output.sequences, SEED)
        torch.testing.assert_close(output.sequences_scores, expected, atol=allowed, rtol=0)
    else:
        assert_logits(output, stock_logits(exact, inputs, output.sequences), allowed)
    if decoding == "greedy":
        assert_greedy(output, SEED)


@sources
@pytest.mark.parametrize("decoding", DECODING)
@dtypes
@ways
def test_never_is_stock(way, dtype, decoding, source, device):
    never_is_stock(way, dtype, device, decoding, source)


# --- exits ----------------------------------------------------------------------------------------------------------


def fixed_exit_is_cut_stock(way, dtype, device, layer, source):
    inputs = SOURCES[source](device)
    output = generate(way, dtype, device, inputs, exit_criterion="fixed", exit_layer=layer)
    stock, exact = (cut_to(found[0], layer) for found in (pair(dtype, device), exact_pair(dtype, device)))
    allowed = allowance(stock, exact, inputs, output.sequences)
    assert_logits(output, stock_logits(exact, inputs, output.sequences), allowed)
    assert_greedy(output, SEED)
    assert set(output.layers_run[output.layers_run > 0].tolist()) == {layer}


@pytest.mark.parametrize("layer, source", [(2, "batch"), (4, "padded left"), (2, "padded right"), (4, "alone")])
@dtypes
@ways
def test_fixed_exits_are_the_cut_stock_model(way, dtype, layer, source, device):
    fixed_exit_is_cut_stock(way, dtype, device, layer, source)


def scripted(seed: int, row_of: int | None = None) -> dict:
    """Settings with scripted exits that differ by row; `row_of` is the row of the batch that runs alone."""
    script = pseudo_random_script(seed, len(DEPTHS))
    at = lambda row, position: DEPTHS[script(row if row_of is None else row_of, position) - 1]  # noqa: E731
    return {"exit_criterion": Scripted(at), "exit_threshold": 0.5}


def assert_is_walk(output, dtype, device, inputs, **settings) -> None:
    """Check an output against the plain walk in higher precision, forced along the same tokens."""
    (stock, _), (exact, walk) = pair(dtype, device), exact_pair(dtype, device)
    allowed = allowance(stock, exact, inputs, output.sequences)
    assert_logits(output, walked_logits(walk, inputs, output.sequences, **settings), allowed)
    assert_greedy(output, SEED)


@sources
@dtypes
@ways
def test_scripts_late_or_at_once_are_the_plain_walks(way, dtype, source, device):
    inputs = SOURCES[source](device)
    for fill in ("lazy", "eager"):
        output = generate(way, dtype, device, inputs, **scripted(5), fill=fill)
        assert_is_walk(output, dtype, device, inputs, **scripted(5))
        script = scripted(5)["exit_criterion"].script
        for row, layers in enumerate(output.layers_run.tolist()):
            assert layers == [script(row, at) if layer else 0 for at, layer in enumerate(layers)]
        if source == "batch":
            laws.assert_not_vacuous(output)


@lru_cache(maxsize=8)
def threshold_of(criterion: str, dtype: torch.dtype, device: torch.device) -> float:
    """A threshold that some tokens pass, chosen at full depth."""
    inputs = SOURCES["batch"](device)
    return threshold_for(exact_pair(dtype, device)[1], inputs, CRITERIA[criterion], max_new_tokens=4)


@pytest.mark.parametrize("criterion", CRITERIA)
@dtypes
@ways
def test_criteria_are_the_plain_walks(way, dtype, criterion, device):
    """A plain walk along the same tokens and exits confirms that rows exit where they pass, with the best token."""
    inputs = SOURCES["batch"](device)
    threshold = threshold_of(criterion, dtype, device)
    output = generate(way, dtype, device, inputs, exit_criterion=criterion, exit_threshold=threshold)
    layers = output.layers_run.tolist()
    watched = Watched(CRITERIA[criterion], lambda row, at: layers[row][at] or 1)
    assert_is_walk(output, dtype, device, inputs, exit_criterion=watched, exit_threshold=0.5)
    judged = assert_exits(output, watched.seen, threshold, CONFIDENCE_TOLERANCE[dtype])
    assert judged >= (len(watched.seen) / 2 if dtype == torch.float32 else 1)
    assert len({*output.layers_run.flatten().tolist()} - {0}) >= 2, "all tokens left after one layer"


@dtypes
@ways
def test_a_batch_is_its_rows_alone(way, dtype, device):
    inputs = SOURCES["batch"](device)
    batch = generate(way, dtype, device, inputs, **scripted(5))
    laws.assert_not_vacuous(batch)
    allowed = allowance(pair(dtype, device)[0], exact_pair(dtype, device)[0], inputs, batch.sequences)
    lengths = (batch.layers_run > 0).sum(dim=1).tolist()
    for row, length in enumerate(lengths):
        sequence = batch.sequences[row : row + 1, : 1 + length]
        model, settings = model_of(way, dtype, device), scripted(5, row) | settings_of(way, device)
        alone = walked_logits(model, one_row(inputs, row), sequence, **settings)
        together = torch.stack(batch.logits, dim=1)[row, :length].float()
        assert distance(together[None], alone, sequence) <= allowed
    assert_greedy(batch, SEED)


@pytest.mark.parametrize(
    "settings", [{"exit_criterion": "softmax", "exit_threshold": 0.1}, scripted(7)], ids=["softmax", "scripted"]
)
@pytest.mark.parametrize("fill", ["lazy", "eager"])
@dtypes
def test_work_reported_is_work_executed(dtype, fill, settings, device):
    _, model = tiny_pair("untied", SEED, dtype, device=device)
    inputs = SOURCES["batch"](device)
    output = laws.work_is_what_ran(model, inputs, SEED, max_new_tokens=NEW_TOKENS, fill=fill, **settings)
    assert output.filled_positions.sum() >= 2 and output.layer_rows[0] > output.layer_rows[-1]


# --- kernels by torch.compile ---------------------------------------------------------------------------------------


def test_kernels_by_the_compiler(device):
    """A single case, since it takes half a minute on a GPU; a CPU uses the eager backend."""
    dtype, inputs = torch.bfloat16, SOURCES["alone"](device)
    if device.type == "cpu":
        output = generate("compiled", dtype, device, inputs, **scripted(5))
    else:
        output = generate("prepared", dtype, device, inputs, **scripted(5), cache_implementation="static")
    assert_is_walk(output, dtype, device, inputs, **scripted(5))


# --- the laws detect mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["padded right", "padded left", "batch"])
@dtypes
@pytest.mark.parametrize("way", ["plain", "prepared"])
def test_padding_that_is_read_is_noticed(way, dtype, source, device, monkeypatch):
    monkeypatch.setattr(t5, "is_padded", lambda mask: False)
    with pytest.raises(AssertionError, match="logits are apart"):
        never_is_stock(way, dtype, device, "greedy", source)


@dtypes
@pytest.mark.parametrize("way", ["plain", "prepared"])
def test_missing_keys_that_stay_zero_are_noticed(way, dtype, device, monkeypatch):
    inputs, adapter = SOURCES["batch"](device), {"plain": "decoder_adapter", "prepared": "prepared_adapter"}[way]
    model = model_of(way, dtype, device)
    with monkeypatch.context() as patch:
        for method in ("project", "project_layers"):
            real = getattr(getattr(model, adapter), method)
            patch.setattr(getattr(model, adapter), method, lambda *args, real=real: zeros_like(real(*args)))
        output = generate(way, dtype, device, inputs, **scripted(5))
    with pytest.raises(AssertionError, match="logits are apart"):
        assert_is_walk(output, dtype, device, inputs, **scripted(5))


def zeros_like(found):
    return tuple(map(torch.zeros_like, found)) if isinstance(found, tuple) else torch.zeros_like(found)
