"""Recorded graphs on a recorder that repeats operations on the very tensors: the laws; nothing moves, nothing grows.

What needs a CUDA device is in `test_on_devices.py`.
"""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from hf_earlyexit import EarlyExitConfig, graphs, t5_graphs
from hf_earlyexit.cache import EarlyExitCache
from hf_earlyexit.compiling import CompileOptions
from hf_earlyexit.graphs import WorkspacePool, roomy
from hf_earlyexit.policies import CRITERIA
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
    """All recorders that were made."""
    made = []

    def recorder_for(device):
        made.append(FakeRecorder(device))
        return made[-1]

    monkeypatch.setattr(graphs, "recorder_for", recorder_for)
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
    assert replays(recorders) > 20


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
    config = EarlyExitConfig(classifier={"kind": "linear", "shared": False, "trained": True})
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
    """What fills a graph up writes to another position of the row that it repeats."""
    ORIGINAL_UPLOAD(self, rows, cache)
    self.workspace.buffers["control"][1, len(rows) : self._size(len(rows))] = 0


ORIGINAL_UPLOAD = t5_graphs.GraphedT5Decoder._upload
MUTATIONS = {
    "what fills a graph up writes elsewhere": ("_upload", filled_up_elsewhere),
    "positions are not told anew": (
        "_upload",
        lambda self, rows, cache: ORIGINAL_UPLOAD(self, rows, ZeroLengths(cache)),
    ),
    "masks and bias of the call are not brought": ("_bring_masks", lambda self, cache: None),
    "confidences are read of another exit": (
        "_evaluate",
        lambda self, criterion, layer, states, previous: self.workspace.buffers["confidences"].fill_(
            layer / NUM_LAYERS
        ),
    ),
}


class ZeroLengths:
    def __init__(self, cache):
        self.lengths, self.device = [0] * cache.num_rows, cache.device


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_breaks_a_law(name, monkeypatch):
    monkeypatch.setattr(t5_graphs.GraphedT5Decoder, *MUTATIONS[name])
    _, model = tiny_pair("untied", 1)
    broken = []
    for call in (scripted(), {"exit_criterion": "softmax", "exit_threshold": 0.08}):
        expected = laws.generate(model, tiny_inputs(4, 1), 1, **call)
        try:
            output = laws.generate(model, tiny_inputs(4, 1), 1, **call, **GRAPHS)
            broken.append(not torch.equal(output.sequences, expected.sequences))
        except (RuntimeError, TypeError, AttributeError):
            broken.append(True)
    assert any(broken)


# --- nothing moves, nothing grows -----------------------------------------------------------------------------------


def test_no_graph_is_recorded_anew_over_200_steps(recorders):
    _, model = tiny_pair("untied", 0, early_exit=EarlyExitConfig([2, 4]))
    model.warm_up(batch_size=8, source_length=20, max_new_tokens=102, disable_compile=True)
    recorded = sum(recorder.recorded for recorder in recorders)
    lengths, counts = 2, 4 + 1 - 1  # 64 and 128 keys; 1, 2, 4 rows, 5 to 7 of 8 rows and all 8
    assert recorded == 3 * lengths * (counts + 1)
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
    """Right, if slower: graphs look where the cache was."""
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


def test_one_read_a_step_at_full_depth_and_one_more_for_every_exit(recorders, monkeypatch):
    """The host waits where it reads: `to_host`, and the recorder's `wait`."""
    from hf_earlyexit import lean, run

    reads = []
    for module in (lean, run):
        monkeypatch.setattr(module, "to_host", lambda tensor: (reads.append(1), tensor.tolist())[1])
    _, model = tiny_pair("untied", 1, early_exit=EarlyExitConfig([2, 4]))
    laws.generate(model, tiny_inputs(4, 1), 1, max_new_tokens=10, ends=None, **GRAPHS)
    assert len(reads) == 10 and not any(recorder.waits for recorder in recorders)
    reads.clear()
    laws.generate(
        model, tiny_inputs(4, 1), 1, max_new_tokens=10, ends=None, exit_criterion="state", exit_threshold=1.0, **GRAPHS
    )
    assert len(reads) == 10 and sum(recorder.waits for recorder in recorders) == 20


def test_room_is_a_power_of_two_and_then_multiples():
    assert [roomy(count) for count in (1, 2, 3, 5, 512, 513, 1024, 1025)] == [1, 2, 4, 8, 512, 1024, 1024, 1536]
    assert roomy(3, 64) == 64
