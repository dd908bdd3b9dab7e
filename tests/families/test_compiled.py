"""Compiled segments: equal tokens, whole graphs, few of them, and no recompilation for any pattern of exits.

Graphs are counted with a backend that runs them as captured; slow tests use inductor.
"""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig

from hf_earlyexit import EarlyExitConfig
from hf_earlyexit.decoding.cache import EarlyExitCache
from hf_earlyexit.decoding.layers import segments
from hf_earlyexit.families.t5 import compiled as t5_compiled
from hf_earlyexit.families.t5.compiled import bucket, filled_up
from hf_earlyexit.kernels.compiling import CompileOptions, static_capacity
from hf_earlyexit.kernels.rows import Rows
from tests import laws
from tests.tiny import FAMILIES, NUM_LAYERS, tiny_inputs, tiny_pair
from tests.watching import Scripted, pseudo_random_script


class Captured:
    """A backend that keeps the captured graphs and runs them unchanged."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        states = next(one for one in inputs if isinstance(one, torch.Tensor) and one.dim() == 2)
        graph.rows = states.shape[0]
        self.graphs.append(graph)
        return graph.forward

    @property
    def keywords(self) -> dict:
        return {"cache_implementation": "static", "compile_config": CompileConfig(backend=self)}


@pytest.fixture
def all_rows(monkeypatch):
    """Compiled segments are used for any number of rows, as on an accelerator."""
    monkeypatch.setattr(t5_compiled, "most_rows", lambda cache: cache.num_rows)


@pytest.fixture
def captured():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield Captured()
    assert not torch._dynamo.utils.counters["graph_break"], "a segment is one graph"


# --- the laws -------------------------------------------------------------------------------------------------------


# One segment of two layers, since tracing costs time per layer and number of rows. The full model has two segments.
SHORT = {"num_layers": 1, "num_decoder_layers": 2}


@pytest.mark.parametrize(
    "family, options, shape",
    [
        *((family, {}, {} if family == "untied" else SHORT) for family in FAMILIES),
        ("untied", {"num_beams": 3}, SHORT),
        ("tied", {"do_sample": True}, SHORT),
    ],
    ids=str,
)
def test_never_is_stock(family, options, shape, captured, all_rows):
    stock, model = tiny_pair(family, 1, **shape)
    torch.manual_seed(1)
    expected = laws.stock_generate(stock, tiny_inputs(4, 1), 1, **options)
    torch.manual_seed(1)
    output = laws.generate(model, tiny_inputs(4, 1), 1, **options, **captured.keywords)
    assert torch.equal(output.sequences, expected.sequences) and captured.graphs


@pytest.mark.parametrize("rows", [4, 7])
def test_single_rows_of_a_batch_are_compiled(rows, captured):
    """As on a CPU: only single rows are compiled."""
    for seed in (0, 1):
        _, model = tiny_pair("untied", seed)
        script = {"exit_criterion": Scripted(pseudo_random_script(seed, NUM_LAYERS)), "exit_threshold": 0.5}
        expected = laws.generate(model, tiny_inputs(rows, seed), seed, **script)
        output = laws.generate(model, tiny_inputs(rows, seed), seed, **script, **captured.keywords)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.layers_run, expected.layers_run)
        laws.assert_not_vacuous(output)
    assert {graph.rows for graph in captured.graphs} == {1}


@pytest.mark.parametrize("rows, seeds", [(1, (0, 1)), (4, (0,)), (7, (1,))])
def test_scripts_follow_the_walk_without_compiling(rows, seeds, captured, all_rows):
    for seed in seeds:
        _, model = tiny_pair("untied", seed)
        script = {"exit_criterion": Scripted(pseudo_random_script(seed, NUM_LAYERS)), "exit_threshold": 0.5}
        expected = laws.generate(model, tiny_inputs(rows, seed), seed, **script)
        output = laws.generate(model, tiny_inputs(rows, seed), seed, **script, **captured.keywords)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.layers_run, expected.layers_run)
        for mine, others in zip(output.logits, expected.logits):
            torch.testing.assert_close(mine, others)
        for counts in ("layer_rows", "filled_positions", "head_rows"):
            assert torch.equal(output[counts], expected[counts])
        laws.assert_not_vacuous(output)


@pytest.mark.parametrize(
    "criterion, threshold, fill", [("softmax", 0.08, "lazy"), ("state", 0.75, "eager"), ("patience", 0.5, "lazy")]
)
def test_criteria_follow_the_walk_without_compiling(criterion, threshold, fill, captured, all_rows):
    _, model = tiny_pair("untied", 1)
    call = {"exit_criterion": criterion, "exit_threshold": threshold, "fill": fill}
    expected = laws.generate(model, tiny_inputs(4, 1), 1, **call)
    output = laws.generate(model, tiny_inputs(4, 1), 1, **call, **captured.keywords)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.layers_run, expected.layers_run)
    torch.testing.assert_close(output.exit_confidences, expected.exit_confidences, equal_nan=True)
    laws.assert_not_vacuous(output)


def test_padded_prompts_follow_the_walk_without_compiling(captured, all_rows):
    prompt = {
        "decoder_input_ids": torch.tensor([[0, 5, 9, 4], [1, 0, 7, 8], [1, 1, 0, 6], [0, 3, 2, 2]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    _, model = tiny_pair("untied")
    call = tiny_inputs(4) | prompt
    script = {"exit_criterion": Scripted(pseudo_random_script(2, NUM_LAYERS)), "exit_threshold": 0.5}
    expected = laws.generate(model, call, **script)
    output = laws.generate(model, call, **script, **captured.keywords)
    assert torch.equal(output.sequences, expected.sequences)
    laws.assert_not_vacuous(output)


# --- how much is compiled -------------------------------------------------------------------------------------------


def lengths_of(exit_points) -> set[int]:
    longest = t5_compiled.LONGEST_SEGMENT
    lengths = [len(segment) for segment in segments(NUM_LAYERS, exit_points)]
    parts = [[longest] * (length // longest) + [length % longest] for length in lengths]
    return {length for some in parts for length in some if length}


@pytest.mark.parametrize("exit_layers", [[1, 2, 3, 4, 5], pytest.param([2, 4], marks=pytest.mark.slow), [1, 4]])
def test_few_graphs_and_none_anew_over_200_steps(exit_layers, captured):
    _, model = tiny_pair("untied", 0, early_exit=EarlyExitConfig(exit_layers))
    depths = [*exit_layers, NUM_LAYERS]
    script = pseudo_random_script(5, len(depths))
    criterion = Scripted(lambda row, position: depths[script(row, position) - 1])
    call = {"exit_criterion": criterion, "exit_threshold": 0.5, "ends": None, **captured.keywords}
    limit = len(lengths_of(exit_layers))  # for one row
    first = laws.generate(model, tiny_inputs(8), max_new_tokens=100, **call)
    graphs = len(captured.graphs)
    assert 0 < graphs <= limit
    second = laws.generate(model, tiny_inputs(8, 1), 1, max_new_tokens=101, **call)
    assert len(captured.graphs) == graphs, "another text needs no other graph"
    assert {*first.layers_run.unique().tolist()} == {*depths}
    assert first.layers_run.shape[1] + second.layers_run.shape[1] == 201
    laws.generate(model, tiny_inputs(5, 2, longest=19), 2, max_new_tokens=150, **call)
    assert len(captured.graphs) <= limit, "nor do another batch, source and length of the text"
    laws.generate(model, tiny_inputs(1, 3), 3, max_new_tokens=20, **call)
    assert len(captured.graphs) <= limit + len(lengths_of(exit_layers)), "a batch of one has its own"


def test_many_rows_come_in_powers_of_two(captured, all_rows):
    """As on an accelerator: shapes are numbers, not symbols."""
    _, model = tiny_pair("untied", 0, early_exit=EarlyExitConfig([2, 4]))
    script = pseudo_random_script(5, 3)
    criterion = Scripted(lambda row, position: 2 * script(row, position))
    call = {"exit_criterion": criterion, "exit_threshold": 0.5}
    expected = laws.generate(model, tiny_inputs(9), max_new_tokens=60, ends=None, **call)
    output = laws.generate(model, tiny_inputs(9), max_new_tokens=60, ends=None, **call, **captured.keywords)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.layers_run, expected.layers_run)
    sizes = [graph.rows for graph in captured.graphs]
    assert len(sizes) == len(set(sizes)) >= 3, "all segments are two layers long"
    assert set(sizes) <= {1, 2, 4, 8, 16}


@pytest.mark.parametrize("rows", [1, 4])
def test_warm_up_leaves_nothing_to_compile(rows, captured, all_rows):
    _, model = tiny_pair("untied", 0, early_exit=EarlyExitConfig([1]), num_decoder_layers=3)
    model.warm_up(batch_size=rows, compile_config=captured.keywords["compile_config"])
    graphs = len(captured.graphs)
    assert model.is_prepared and graphs
    criterion = Scripted(lambda row, position: 1 if pseudo_random_script(5, 2)(row, position) == 1 else 3)
    call = {"exit_criterion": criterion, "exit_threshold": 0.5, **captured.keywords}
    output = laws.generate(model, tiny_inputs(rows), max_new_tokens=40, ends=None, **call)
    assert {*output.layers_run.unique().tolist()} == {1, 3}
    assert len(captured.graphs) == graphs
    with pytest.raises(ValueError, match=r"`exit_layers=\[2\]` has \[2\], which are no exit points"):
        model.warm_up(exit_layers=[2])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
def test_inductor_says_the_same(rows, dtype):
    torch._dynamo.reset()
    _, model = tiny_pair("untied", 1, dtype, early_exit=EarlyExitConfig([2, 4]))
    model.prepare_for_generation()
    call = {"exit_criterion": Scripted(pseudo_random_script(3, 4)), "exit_threshold": 0.5}
    expected = laws.generate(model, tiny_inputs(rows, 1), 1, **call)
    output = laws.generate(model, tiny_inputs(rows, 1), 1, **call, cache_implementation="static")
    assert torch.equal(output.layers_run, expected.layers_run)
    if dtype == torch.float32:
        assert torch.equal(output.sequences, expected.sequences)
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
    torch.testing.assert_close(output.logits[0], expected.logits[0], **tolerance)


# --- parts ----------------------------------------------------------------------------------------------------------


@torch._dynamo.config.patch(recompile_limit=2)
def test_many_models_and_shapes_do_not_share_one_count_of_compilations(captured):
    """Torch limits compilations per code object, before 2.13 across all functions that share it; ours share none."""
    for seed in range(torch._dynamo.config.recompile_limit + 2):
        _, model = tiny_pair("untied", seed, **SHORT)
        output = laws.generate(model, tiny_inputs(1, seed), seed, max_new_tokens=3, **captured.keywords)
        assert output.layers_run.max() == 2 and len(captured.graphs) > seed


def test_a_cache_of_ones_own_serves_again(captured, all_rows):
    _, model = tiny_pair("untied", 1)
    own = EarlyExitCache(NUM_LAYERS, 4, 4, 8, dtype=torch.float64, capacity=4)
    call = {"exit_criterion": Scripted(pseudo_random_script(1, NUM_LAYERS)), "exit_threshold": 0.5}
    for seed in (0, 1):
        expected = laws.generate(model, tiny_inputs(4, seed), seed, **call)
        own.reset()
        output = laws.generate(model, tiny_inputs(4, seed), seed, **call, **captured.keywords, cache=own)
        assert torch.equal(output.sequences, expected.sequences)
    assert own.capacity > 4, "it has grown on the way"


class Interrupting:
    def __init__(self, at: int):
        self.at = at

    def confidence(self, point):
        if point.positions[0] == self.at and point.layer == 1:
            raise KeyboardInterrupt
        return point.hidden.new_zeros(len(point.rows))


def test_after_an_interruption_the_model_is_as_it_was(captured, all_rows):
    _, model = tiny_pair("untied", 1, **SHORT)
    expected = laws.generate(model, tiny_inputs(4, 1), 1, **captured.keywords)
    with pytest.raises(KeyboardInterrupt):
        call = {"exit_criterion": Interrupting(2), "exit_threshold": 0.5}
        laws.generate(model, tiny_inputs(4, 1), 1, **call, **captured.keywords)
    again = laws.generate(model, tiny_inputs(4, 1), 1, **captured.keywords)
    assert torch.equal(again.sequences, expected.sequences)


def test_a_static_cache_without_compiling():
    stock, model = tiny_pair("untied")
    expected = laws.stock_generate(stock, tiny_inputs(4))
    output = laws.generate(model, tiny_inputs(4), cache_implementation="static", disable_compile=True)
    assert torch.equal(output.sequences, expected.sequences) and not model.is_prepared
    assert output.cache.capacity == static_capacity(17) == 64


def test_options_are_the_librarys_without_its_defaults_for_another_device():
    from transformers import GenerationConfig

    static = GenerationConfig(cache_implementation="static")
    assert CompileOptions.of(GenerationConfig(), torch.device("cpu")) is None
    assert CompileOptions.of(static, torch.device("cpu")) == CompileOptions()
    assert CompileOptions.of(static, torch.device("cuda")) == CompileOptions(), "graphs are recorded by ourselves"
    static.compile_config = CompileConfig(backend="aot_eager", mode="reduce-overhead")
    assert CompileOptions.of(static, torch.device("cpu")) == CompileOptions("aot_eager")
    static.compile_config = CompileConfig(mode="max-autotune")
    assert CompileOptions.of(static, torch.device("cpu")) == CompileOptions(mode="max-autotune-no-cudagraphs")
    static.compile_config = CompileConfig(options={"max_autotune": True})
    assert CompileOptions.of(static, torch.device("cpu")).options == (("max_autotune", True),)


def test_buckets_and_filling_up():
    assert [bucket(rows) for rows in (1, 2, 3, 4, 5, 9)] == [1, 2, 4, 4, 8, 16]
    assert filled_up(torch.tensor([3, 7]), 4).tolist() == [3, 7, 7, 7]


@pytest.mark.parametrize("chosen", [[0, 1, 2], [1], [0, 2]])
def test_layers_are_written_as_one_by_one(chosen):
    """Rows of equal and of different lengths."""
    for lengths in ([2, 2, 2], [1, 3, 2]):
        one, other = (EarlyExitCache(4, 3, 2, 5, capacity=8) for _ in range(2))
        rows, keys, values = Rows(chosen, 3), torch.randn(2, len(chosen), 2, 5), torch.randn(2, len(chosen), 2, 5)
        one.lengths, other.lengths = list(lengths), list(lengths)
        one.write_layers(range(2, 4), rows, torch.stack([keys, values]))
        for place, layer in enumerate((2, 3)):
            other.write(layer, rows, keys[place][:, :, None], values[place][:, :, None])
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
        assert one.filled == other.filled and one.keys.any()
