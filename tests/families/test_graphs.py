"""Recorded graphs, with a recorder that repeats operations on the same tensors: laws, fixed addresses, bounded memory.

Tests that need a CUDA device are in `test_on_devices.py`.
"""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode

from hf_earlyexit import ClassifierConfig, EarlyExitConfig
from hf_earlyexit.decoding.cache import EarlyExitCache
from hf_earlyexit.exits.criteria import CRITERIA
from hf_earlyexit.families.t5 import graphs as t5_graphs
from hf_earlyexit.kernels import graphs
from hf_earlyexit.kernels.compiling import CompileOptions
from hf_earlyexit.kernels.graphs import WorkspacePool, roomy
from tests import laws
from tests.recorded import FakeRecorder
from tests.tiny import FAMILIES, NUM_LAYERS, one_row, tiny_inputs, tiny_pair
from tests.watching import Scripted, pseudo_random_script, threshold_for


GRAPHS = {"cache_implementation": "static", "disable_compile": True}
PROMPT = {
    "decoder_input_ids": torch.tensor([[0, 5, 9, 4], [1, 0, 7, 8], [1, 1, 0, 6], [0, 3, 2, 2]]),
    "decoder_attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]),
}


@pytest.fixture(autouse=True)
def recorders(monkeypatch):
    """All recorders that are made in a test."""
    made = []

    def recorder_on(device):
        made.append(FakeRecorder(device))
        return made[-1]

    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorder_on)
    monkeypatch.setattr(CompileOptions, "of", classmethod(lambda cls, config, device: options_of(cls, config)))
    return made


def options_of(cls, config):
    return cls(backend=None) if config.cache_implementation == "static" else None


def scripted(seed: int = 1) -> dict:
    return {"exit_criterion": Scripted(pseudo_random_script(seed, NUM_LAYERS)), "exit_threshold": 0.5}


def pool_of(model) -> WorkspacePool:
    return model._prepared_copy.weights.graphed.pool


def replays(recorders) -> int:
    return sum(recorder.replayed for recorder in recorders)


# --- the laws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, options",
    [*((family, {}) for family in FAMILIES), ("untied", {"num_beams": 3}), ("tied", {"do_sample": True})],
    ids=str,
)
def test_never_is_stock(family, options, recorders):
    stock, model = tiny_pair(family, 1)
    for inputs in (tiny_inputs(4, 1), one_row(tiny_inputs(4, 1), 2), tiny_inputs(4, 1) | PROMPT):
        torch.manual_seed(1)
        expected = laws.stock_generate(stock, inputs, 1, **options)
        torch.manual_seed(1)
        output = laws.generate(model, inputs, 1, **options, **GRAPHS)
        assert torch.equal(output.sequences, expected.sequences)
    assert replays(recorders) > 15


@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("fill", ["lazy", "eager"])
def test_scripts_follow_the_walk_without_graphs(rows, fill, recorders):
    for seed in (0, 1):
        _, model = tiny_pair("untied", seed)
        expected = laws.generate(model, tiny_inputs(rows, seed), seed, **scripted(), fill=fill)
        output = laws.generate(model, tiny_inputs(rows, seed), seed, **scripted(), fill=fill, **GRAPHS)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.layers_run, expected.layers_run)
        for mine, others in zip(output.logits, expected.logits):
            torch.testing.assert_close(mine, others)
        for counts in ("layer_rows", "filled_positions", "head_rows"):
            assert torch.equal(output[counts], expected[counts])
        laws.assert_not_vacuous(output)
    assert replays(recorders) > 20


@pytest.mark.parametrize("criterion", ["softmax", "max_prob", "entropy", "state", "classifier", "patience"])
def test_criteria_follow_the_walk_without_graphs(criterion):
    config = EarlyExitConfig(classifier=ClassifierConfig(shared=False, trained=True))
    _, model = tiny_pair("untied", 1, early_exit=config)
    threshold = threshold_for(model, tiny_inputs(4, 1), CRITERIA[criterion](), 0.8)
    call, depths = {"exit_criterion": criterion, "exit_threshold": threshold, "fill": "eager"}, set()
    for more in ({}, {"batch_exit": "batch"}, {"num_beams": 2}):
        expected = laws.generate(model, tiny_inputs(4, 1), 1, **call, **more)
        output = laws.generate(model, tiny_inputs(4, 1), 1, **call, **more, **GRAPHS)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.layers_run, expected.layers_run)
        torch.testing.assert_close(output.exit_confidences, expected.exit_confidences, equal_nan=True)
        assert torch.equal(output.head_rows, expected.head_rows)
        depths |= {*output.layers_run.flatten().tolist()} - {0}
    assert len(depths) >= 3


def test_padding_of_sources_and_prompts_is_heeded():
    _, model = tiny_pair("untied")
    left = {name: tensor.flip(1) for name, tensor in tiny_inputs(4).items()}
    single = {name: torch.nn.functional.pad(tensor[:1], (0, 9)) for name, tensor in tiny_inputs(4).items()}
    for inputs in (left, single, tiny_inputs(4) | PROMPT):
        expected = laws.generate(model, inputs, **scripted(2))
        output = laws.generate(model, inputs, **scripted(2), **GRAPHS)
        assert torch.equal(output.sequences, expected.sequences)


def test_the_default_fills_at_once_and_says_so():
    _, model = tiny_pair("untied")
    eager = laws.generate(model, tiny_inputs(4), **scripted(), fill="eager")
    output = laws.generate(model, tiny_inputs(4), **scripted(), **GRAPHS)
    assert torch.equal(output.filled_positions, eager.filled_positions)
    assert torch.equal(output.sequences, eager.sequences)


# --- mutations ------------------------------------------------------------------------------------------------------


def filled_up_elsewhere(self, rows, cache):
    """Repeated rows that fill up a graph write to another position of their row."""
    ORIGINAL["_upload"](self, rows, cache)
    self.workspace.buffers["control"][1, len(rows) : self._size(len(rows))] = 0


def at_the_start(self, rows, cache):
    ORIGINAL["_upload"](self, rows, ZeroLengths(cache))


def without_prompt_bias(self, cache):
    ORIGINAL["_bring_masks"](self, cache)
    self.workspace.buffers["prompt_bias"].zero_()


def without_end_of_source(self, cache):
    ORIGINAL["_bring_masks"](self, cache)
    self.workspace.buffers["cross_bias"].clamp_(min=torch.finfo(self.dtype).min)
    self.workspace.buffers["cross_bias"][..., self.cross_mask.shape[-1] :] = 0


def confident_by_layer(self, criterion, layer, states, previous):
    ORIGINAL["_evaluate"](self, criterion, layer, states, previous)
    self.workspace.buffers["confidences", layer].fill_(layer / NUM_LAYERS)


def by_the_first_places(self, layer, rows):
    """Confidences of all evaluated rows are read as those of the continuing rows, by place."""
    if self.asked is not None:
        self.asked = t5_graphs.Enqueued(self.asked.layers, rows)
    return ORIGINAL["answer"](self, layer, rows)


def of_the_layers_behind(self, layer, rows):
    """The next graph overwrites the confidences before the host reads them."""
    if self.early is not None and self.early.layers[-1] in self.questions:
        buffers = self.workspace.buffers
        buffers["confidences", layer].copy_(buffers["confidences", self.early.layers[-1]])
    return ORIGINAL["answer"](self, layer, rows)


ORIGINAL = {
    name: getattr(t5_graphs.GraphedT5Decoder, name) for name in ("_upload", "_bring_masks", "_evaluate", "answer")
}
MUTATIONS = {
    "what fills a graph up writes elsewhere": ("_upload", filled_up_elsewhere),
    "positions are not told anew": ("_upload", at_the_start),
    "padding of a prompt is read": ("_bring_masks", without_prompt_bias),
    "what lies behind the source is read": ("_bring_masks", without_end_of_source),
    "confidences are not the criterion's": ("_evaluate", confident_by_layer),
    "confidences are those of rows that left": ("answer", by_the_first_places),
    "confidences are those of the exit behind": ("answer", of_the_layers_behind),
}


class ZeroLengths:
    def __init__(self, cache):
        self.lengths, self.device = [0] * cache.num_rows, cache.device


@pytest.mark.once
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_breaks_a_law(name, monkeypatch):
    _, model = tiny_pair("untied", 1)
    state = {"exit_criterion": "state", "exit_threshold": 0.85, "max_new_tokens": 40, "ends": None}
    calls = [scripted(), {"exit_criterion": "softmax", "exit_threshold": 0.08}, state]
    inputs = tiny_inputs(4, 1) | PROMPT
    expected = [laws.generate(model, inputs, 1, **call).sequences for call in calls]
    found = [laws.generate(model, inputs, 1, **call, **GRAPHS).sequences for call in calls]
    assert all(map(torch.equal, found, expected))
    model.unprepare()  # also drops the recorded graphs
    monkeypatch.setattr(t5_graphs.GraphedT5Decoder, *MUTATIONS[name])
    found = [laws.generate(model, inputs, 1, **call, **GRAPHS).sequences for call in calls]
    assert not all(map(torch.equal, found, expected))


# --- running ahead --------------------------------------------------------------------------------------------------


class Watched(FakeRecorder):
    """A recorder that logs the order of its calls."""

    def __init__(self, device):
        super().__init__(device)
        self.order = []

    def mark(self) -> None:
        super().mark()
        self.order.append("mark")

    def wait(self) -> None:
        super().wait()
        self.order.append("wait")

    def record(self, function):
        replay = super().record(function)

        def watched() -> None:
            self.order.append("replay")
            replay()

        return watched


class Sure:
    """Settings with which all rows exit at the first exit point, or none at any."""

    def __init__(self, sure: bool):
        self.settings = {"exit_criterion": "state", "exit_threshold": 0.0 if sure else 1.0}


@pytest.mark.parametrize("sure", [True, False])
def test_the_device_is_run_ahead_where_rows_go_on(sure, monkeypatch):
    made = []
    monkeypatch.setitem(graphs.RECORDERS, "cpu", lambda device: made.append(Watched(device)) or made[-1])
    _, model = tiny_pair("untied", 1, early_exit=EarlyExitConfig([2, 4]))
    output = laws.generate(model, tiny_inputs(4, 1), 1, max_new_tokens=20, ends=None, **Sure(sure).settings, **GRAPHS)
    assert {*output.layers_run.unique().tolist()} == ({2} if sure else {NUM_LAYERS})
    order = made[0].order
    if sure:  # until the average reaches a quarter
        steps = ["replay", "mark", "replay", "wait"] * 3 + ["replay", "mark", "wait"] * 17
    else:
        steps = ["replay", "mark", "replay", "wait", "mark", "replay", "wait"] * 20
    assert order == steps


@pytest.mark.parametrize("fill", ["lazy", "eager"])
@pytest.mark.parametrize("criterion", ["softmax", "state"])
def test_some_of_the_rows_that_were_run_ahead_leave(criterion, fill):
    """Running ahead is exact over many tokens of a batch whose rows exit at all exit points, together and alone."""
    _, model = tiny_pair("untied", 3, early_exit=EarlyExitConfig([2, 3, 5]))
    inputs = tiny_inputs(7, 3)
    threshold = threshold_for(model, inputs, CRITERIA[criterion](), 0.6, max_new_tokens=16)
    call = {"exit_criterion": criterion, "exit_threshold": threshold, "fill": fill, "max_new_tokens": 40, "ends": None}
    expected = laws.generate(model, inputs, 3, **call)
    output = laws.generate(model, inputs, 3, **call, **GRAPHS)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.layers_run, expected.layers_run)
    assert torch.equal(output.layer_rows, expected.layer_rows)
    torch.testing.assert_close(output.exit_confidences, expected.exit_confidences, equal_nan=True)
    depths = output.layers_run
    assert {*depths.flatten().tolist()} == {2, 3, 5, NUM_LAYERS} and (depths != depths[:1]).any(dim=0).sum() > 10


# --- nothing moves, nothing grows -----------------------------------------------------------------------------------


def test_no_graph_is_recorded_anew_over_200_steps(recorders):
    _, model = tiny_pair("untied", 0, early_exit=EarlyExitConfig([2, 4]))
    model.warm_up(batch_size=8, source_length=20, max_new_tokens=102, disable_compile=True)
    recorded = sum(recorder.recorded for recorder in recorders)
    lengths, counts = [64, 128], ["1 row", "2 rows", "4 rows", "8 rows, some repeated", "all 8 rows"]
    assert recorded == 3 * len(lengths) * len(counts)
    script = pseudo_random_script(5, 3)
    call = {
        "exit_criterion": Scripted(lambda row, at: 2 * script(row, at)),
        "exit_threshold": 0.5,
        "ends": None,
        **GRAPHS,
    }
    for seed, (rows, longest, tokens) in enumerate([(8, 11, 102), (5, 19, 60), (7, 7, 40)]):
        output = laws.generate(model, tiny_inputs(rows, seed, longest), seed, max_new_tokens=tokens, **call)
        assert {*output.layers_run.unique().tolist()} == {2, 4, 6}
        del output
        gc.collect()
    assert sum(recorder.recorded for recorder in recorders) == recorded
    assert len(recorders) == 1 or sum(1 for recorder in recorders if recorder.recorded) == 1, (
        "one workspace serves all"
    )


def test_warm_up_records_the_question_too(recorders):
    _, model = tiny_pair("untied", 0, early_exit=EarlyExitConfig([2, 4]))
    model.warm_up(batch_size=4, disable_compile=True, exit_criterion="state")
    recorded = sum(recorder.recorded for recorder in recorders)
    laws.generate(model, tiny_inputs(4), exit_criterion="state", exit_threshold=0.75, **GRAPHS)
    assert sum(recorder.recorded for recorder in recorders) == recorded > 0


def test_a_kept_cache_keeps_its_workspace_and_a_dropped_one_gives_it_back():
    _, model = tiny_pair("untied")
    first = laws.generate(model, tiny_inputs(4), **GRAPHS)
    kept = first.past_key_values.keys.clone()
    second = laws.generate(model, tiny_inputs(4, 1), **GRAPHS)
    assert torch.equal(first.past_key_values.keys, kept), "a later call has written to what somebody holds"
    assert not torch.equal(second.past_key_values.keys, kept) and len(pool_of(model)) == 0
    del first, second
    gc.collect()
    assert len(pool_of(model)) == 2


def test_idle_workspaces_are_bounded():
    _, model = tiny_pair("untied")
    for rows in (1, 2, 4, 8, 16, 32, 1):
        laws.generate(model, tiny_inputs(rows), max_new_tokens=2, **GRAPHS)
        gc.collect()
    assert len(pool_of(model)) <= graphs.MOST_IDLE + 1


def test_numbers_that_are_not_finite_do_not_reach_the_next_call():
    _, model = tiny_pair("untied")
    expected = laws.generate(model, tiny_inputs(4), **GRAPHS).sequences
    gc.collect()
    for _, workspace in pool_of(model)._idle:
        for name in ("arena", "cross"):
            workspace.buffers[name].fill_(float("nan"))
    assert torch.equal(laws.generate(model, tiny_inputs(4), **GRAPHS).sequences, expected)


def test_a_cache_of_ones_own_serves_again():
    _, model = tiny_pair("untied", 1)
    own = EarlyExitCache(NUM_LAYERS, 4, 4, 8, dtype=torch.float64, capacity=4, fill="eager")
    for seed in (0, 1, 2):
        expected = laws.generate(model, tiny_inputs(4, seed), seed, **scripted())
        own.reset()
        output = laws.generate(model, tiny_inputs(4, seed), seed, **scripted(), **GRAPHS, past_key_values=own)
        assert torch.equal(output.sequences, expected.sequences)
    assert own.capacity >= 64 and len(pool_of(model)) == 0, "it goes on in the workspace that it has"


def test_a_cache_that_has_moved_is_decoded_without_graphs(monkeypatch, recorders):
    """Graphs read the old arena, so a cache that has moved is decoded without graphs, correctly but slower."""
    _, model = tiny_pair("untied", 1)
    monkeypatch.setattr(t5_graphs.GraphedT5Decoder, "lend", staticmethod(lend_little))
    expected = laws.generate(model, tiny_inputs(4, 1), 1, max_new_tokens=70, ends=None, **scripted())
    output = laws.generate(model, tiny_inputs(4, 1), 1, max_new_tokens=70, ends=None, **scripted(), **GRAPHS)
    assert torch.equal(output.sequences, expected.sequences)
    assert output.past_key_values.capacity > 64 and 0 < replays(recorders)


LEND = t5_graphs.GraphedT5Decoder.lend


def lend_little(prepared, model, cache, capacity):
    LEND(prepared, model, cache, 1)


class Interrupting:
    def confidence(self, point):
        if point.positions[0] == 2 and point.layer == 3:
            raise KeyboardInterrupt
        return point.hidden.new_zeros(len(point.rows))


def test_after_an_interruption_the_model_is_as_it_was():
    _, model = tiny_pair("untied", 1)
    expected = laws.generate(model, tiny_inputs(4, 1), 1, **GRAPHS)
    with pytest.raises(KeyboardInterrupt):
        laws.generate(model, tiny_inputs(4, 1), 1, exit_criterion=Interrupting(), exit_threshold=0.5, **GRAPHS)
    assert torch.equal(laws.generate(model, tiny_inputs(4, 1), 1, **GRAPHS).sequences, expected.sequences)


def test_threads_share_graphs_and_not_workspaces():
    _, model = tiny_pair("untied", 1)
    model.prepare_for_generation()
    expected = [laws.generate(model, tiny_inputs(4, seed), seed, **scripted()).sequences for seed in range(3)]
    found = {}

    def run(seed: int) -> None:
        for _ in range(2):
            found[seed] = laws.generate(model, tiny_inputs(4, seed), seed, **scripted(), **GRAPHS).sequences

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(3))


def test_graphs_go_with_the_prepared_copy():
    stock, model = tiny_pair("untied", 1)
    laws.generate(model, tiny_inputs(4, 1), 1, **GRAPHS)
    with torch.no_grad():
        for one in (stock, model):
            one.decoder.block[1].layer[2].DenseReluDense.wo.weight.mul_(-1.5)
    expected = laws.stock_generate(stock, tiny_inputs(4, 1), 1)
    assert torch.equal(laws.generate(model, tiny_inputs(4, 1), 1, **GRAPHS).sequences, expected.sequences)


class Reads(TorchFunctionMode):
    """Counts reads of tensors by the host, in any module."""

    READS = tuple(getattr(torch.Tensor, name) for name in ("tolist", "item", "__bool__", "__int__", "__float__"))

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in self.READS
        return function(*args, **(kwargs or {}))


def test_one_read_a_step_at_full_depth_and_one_more_for_every_exit(recorders):
    """Reads are the difference between a longer and a shorter call; the recorder counts waits for a graph."""
    _, model = tiny_pair("untied", 1, early_exit=EarlyExitConfig([2, 4]))
    vain = {"exit_criterion": "state", "exit_threshold": 1.0}
    for settings, waits, reads in (({}, 0, 10), (vain, 20, 30)):
        counts = []
        for tokens in (10, 20):
            before = sum(recorder.waits for recorder in recorders)
            with Reads() as seen:
                laws.generate(model, tiny_inputs(4, 1), 1, max_new_tokens=tokens, ends=None, **settings, **GRAPHS)
            counts.append((seen.count, sum(recorder.waits for recorder in recorders) - before))
        assert [later - sooner for sooner, later in zip(*counts)] == [reads, waits]


def test_a_source_that_is_all_padding_is_as_without_graphs():
    _, model = tiny_pair("untied")
    inputs = tiny_inputs(4)
    inputs["attention_mask"][2] = 0
    expected, output = laws.generate(model, inputs), laws.generate(model, inputs, **GRAPHS)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.logits[0], expected.logits[0])


def test_a_cache_of_ones_own_says_how_it_is_filled():
    _, model = tiny_pair("untied", 1)
    own = EarlyExitCache(NUM_LAYERS, 4, 4, 8, dtype=torch.float64, fill="lazy")
    expected = laws.generate(model, tiny_inputs(4, 1), 1, **scripted(), fill="lazy")
    output = laws.generate(model, tiny_inputs(4, 1), 1, **scripted(), **GRAPHS, past_key_values=own)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.filled_positions, expected.filled_positions)


def test_a_workspace_belongs_to_one_call_after_one_that_could_not_be_made():
    pool, first, second = WorkspacePool(), Owner(), Owner()
    small, large = graphs.Room(4, 64, 64), graphs.Room(4, 128, 64)
    make = lambda room: graphs.Workspace(FakeRecorder(torch.device("cpu")), {})  # noqa: E731
    pool.lend(first, small, make)
    with pytest.raises(MemoryError):
        pool.lend(first, large, refuse_to_make)
    assert pool.lend(first, small, make) is not pool.lend(second, small, make)


def test_idle_workspaces_go_where_memory_runs_out():
    pool, attempts = WorkspacePool(), []

    def make(room):
        attempts.append(len(pool))
        if len(pool):
            raise torch.OutOfMemoryError
        return graphs.Workspace(FakeRecorder(torch.device("cpu")), {})

    pool.take_back(graphs.Room(2, 64, 64), graphs.Workspace(FakeRecorder(torch.device("cpu")), {}))
    pool.lend(Owner(), graphs.Room(4, 64, 64), make)
    assert attempts == [1, 0]


class Owner:
    pass


def refuse_to_make(room):
    raise MemoryError


@pytest.mark.parametrize("part", ["classifier", "activation"])
def test_python_that_would_not_run_is_refused_before_any_work(part, monkeypatch):
    config = EarlyExitConfig(classifier=ClassifierConfig(trained=True))
    _, model = tiny_pair("untied", 1, early_exit=config)
    call = {"exit_criterion": "classifier", "exit_threshold": 0.5}
    laws.generate(model, tiny_inputs(4, 1), 1, **call, **GRAPHS)
    if part == "classifier":
        model.exit_heads.classifiers["shared"].register_forward_hook(lambda module, args, output: output + 100)
    else:
        model.decoder.block[2].layer[2].DenseReluDense.act = Reading()
    monkeypatch.setattr(model.encoder, "forward", None)
    name = {"classifier": "exit_heads.classifiers.shared", "activation": r"decoder.block.2.*act"}[part]
    with pytest.raises(ValueError, match=f"would not run the Python of `{name}"):
        laws.generate(model, tiny_inputs(4, 1), 1, **call, **GRAPHS)


class Reading(torch.nn.Module):
    def forward(self, states):
        return states * float(states.abs().max() > 0)


def test_a_criterion_that_is_none_is_refused_by_warm_up():
    _, model = tiny_pair("untied")
    with pytest.raises(ValueError, match="`exit_criterion` must be one of"):
        model.warm_up(exit_criterion="sofmax", disable_compile=True)
    with pytest.raises(ValueError, match="classifier"):
        model.warm_up(exit_criterion="classifier", disable_compile=True)


def test_room_is_a_power_of_two_and_then_multiples():
    assert [roomy(count) for count in (1, 2, 3, 5, 512, 513, 1024, 1025)] == [1, 2, 4, 8, 512, 1024, 1024, 1536]
    assert roomy(3, 64) == 64
