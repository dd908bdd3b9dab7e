"""The timed walk writes what `generate` writes, accounts for all time, and restores the model."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from hf_earlyexit.exits.criteria import SoftmaxResponse
from hf_earlyexit.kernels.compiling import CompileOptions
from hf_earlyexit.speed.roofline import CATCH_UP, CROSS, HEADS, LAYERS, REST, SOURCE
from hf_earlyexit.speed.simulation import pieces_of, simulate
from hf_earlyexit.speed.timed_walk import (
    Replay,
    cache_for,
    measure_roofline,
    parts_timed,
    source_states,
    time_walks,
    timed,
    walk,
)
from hf_earlyexit.speed.timing import Stopwatch
from tests.tiny import NUM_LAYERS, tiny_pair


EXITS = (1, 3, 4)
PARTS = {LAYERS, CROSS, SOURCE, CATCH_UP, HEADS, REST}


class Steps:
    """A clock that advances by one second per reading."""

    def __init__(self):
        self.now = 0

    def __call__(self) -> int:
        self.now += 1
        return self.now


@pytest.fixture(params=("stock blocks", "prepared"))
def model(request):
    _, model = tiny_pair("untied", dtype=torch.float32)
    return model.prepare_for_generation() if request.param == "prepared" else model


def script(rows: int, steps: int = 10, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, NUM_LAYERS + 1, (steps, rows))


def hooks_of(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def generated(model, states, replay) -> torch.Tensor:
    output = model.generate(
        encoder_outputs=BaseModelOutput(states),
        attention_mask=torch.ones(states.shape[:2], dtype=torch.long),
        exit_criterion=replay,
        exit_threshold=0.5,
        exit_layers=list(EXITS),
        max_new_tokens=len(replay.layers),
        eos_token_id=-1,
        pad_token_id=0,
    )
    return output[:, 1:]


@pytest.mark.parametrize("rows", (1, 4))
def test_it_says_what_generate_says_with_timers_and_without(model, rows):
    states, replay = source_states(model, rows, 6), Replay(script(rows), SoftmaxResponse())
    expected = generated(model, states, replay)
    for watch in (None, Stopwatch(Steps(), REST)):
        walked = walk(model, states, replay, EXITS, watch)
        assert torch.equal(walked.tokens, expected)
        depths = simulate(replay.layers[None], NUM_LAYERS, EXITS).depths[0]
        assert walked.run.layers_run().T.tolist() == depths.tolist()
    assert len(set(expected.flatten().tolist())) > 3, "it repeats itself"


def test_every_moment_belongs_to_a_part(model):
    """With a clock that ticks per reading, the seconds of the parts add up to its ticks, and every part has some."""
    clock = Steps()
    watch = Stopwatch(clock, REST)
    walk(model, source_states(model, 3, 6), Replay(script(3), SoftmaxResponse()), EXITS, watch)
    assert sum(watch.seconds.values()) == clock.now - 1
    assert set(watch.seconds) == PARTS and watch.running == [REST]
    assert hooks_of(model) == 0


def test_cross_attention_is_entered_as_often_as_blocks_run(model):
    """Cross-attention takes one tick per visit, so nothing inside of it counts as layers."""
    replay, entered = Replay(script(3)), []
    watch = Stopwatch(Steps(), REST)
    enter = watch.enter
    watch.enter = lambda part: entered.append(part) or enter(part)
    walked = walk(model, source_states(model, 3, 6), replay, EXITS, watch)
    simulated = simulate(replay.layers[None], NUM_LAYERS, EXITS)
    visits = int((simulated.rows > 0).sum())
    assert entered.count(CROSS) == entered.count(SOURCE) == visits
    assert 0 < entered.count(CATCH_UP) < visits, "only where a segment lacks keys and values"
    assert watch.seconds[CROSS] == visits
    # Exiting rows compute the head input layer by layer, and share one product with the head.
    assert entered.count(HEADS) == int((simulated.head_rows > 0).sum() + (simulated.head_products > 0).sum())
    assert walked.run.work_by_layer()["layer_rows"].sum() == simulated.rows.sum()


def test_nothing_is_left_behind_after_an_exception(model):
    class Broken:
        def confidence(self, point):
            raise KeyboardInterrupt

    states = source_states(model, 2, 6)
    with pytest.raises(KeyboardInterrupt):
        walk(model, states, Replay(script(2), Broken()), EXITS, Stopwatch(Steps(), REST))
    assert hooks_of(model) == 0
    replay = Replay(script(2))
    assert torch.equal(walk(model, states, replay, EXITS).tokens, generated(model, states, replay))


@pytest.mark.parametrize("error", (None, KeyboardInterrupt))
def test_adapter_and_cache_are_as_before(model, error):
    cache = cache_for(model, source_states(model, 2, 6), steps=3)
    decoder = model._new_decoder(model._prepared_copy, cache)
    before = [set(vars(one)) for one in (cache, decoder)]
    with contextlib.suppress(KeyboardInterrupt), parts_timed(decoder, cache, Stopwatch(Steps(), REST)):
        assert set(vars(cache)) - before[0] == {"backfill", "fill_cross"}
        if error:
            raise error
    assert [set(vars(one)) for one in (cache, decoder)] == before and hooks_of(model) == 0


def test_what_is_entered_is_left_where_a_block_raises():
    _, model = tiny_pair("untied", dtype=torch.float32)
    watch, broken = Stopwatch(Steps(), REST), copy.deepcopy(model)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    broken.decoder.block[2].layer[1].EncDecAttention.forward = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        walk(broken, source_states(model, 1, 6), Replay(script(1) * 0 + NUM_LAYERS), (), watch)
    assert watch.running == [REST] and hooks_of(broken) == 0


def test_a_stopwatch_gives_each_moment_to_the_innermost_part():
    watch = Stopwatch(Steps(), "rest")
    inner = watch.timed("inner", lambda: None)
    outer = watch.timed("outer", lambda: (inner(), inner()))
    watch.start()
    outer()
    watch.lap()
    assert watch.seconds == {"rest": 2, "outer": 3, "inner": 2}


def test_seconds_of_all_parts(model):
    seconds = timed(model, source_states(model, 2, 6), Replay(script(2)), EXITS)
    assert set(seconds) == PARTS and min(seconds.values()) > 0


def test_rounds_are_timed_apart_from_the_one_that_warms_up(model, monkeypatch):
    walked = []
    monkeypatch.setattr(
        "hf_earlyexit.speed.timed_walk.timed",
        lambda model, states, replay, exits, compiling: walked.append(replay) or {REST: 10.0, HEADS: 1.0},
    )
    replays = [Replay(piece) for piece in pieces_of([[1, 3, 6, 2, 5]], 3, 2, 4)]
    times = time_walks(model, source_states(model, 2, 6), replays, EXITS)
    assert walked == [replays[0], *replays]
    assert times.parts == {REST: 30.0, HEADS: 3.0} and times.untimed > 0


def test_a_roofline_of_a_real_model(model, monkeypatch):
    monkeypatch.setattr("hf_earlyexit.speed.machine_rates.LARGE", 2**21)
    found, rates, mean_layers = measure_roofline(
        model, [[1, 6, 3]], EXITS, "softmax", batch_size=2, source=5, new_tokens=6, rounds=2
    )
    assert {part.name for part in found.parts} == PARTS
    assert mean_layers == 10 / 3 and rates.working_set > 0
    assert all(part.measured > 0 for part in found.parts)
    assert all(part.ideal >= max(part.memory, part.compute) * (1 - 1e-9) for part in found.parts)


def test_a_roofline_of_compiled_regions_has_layers_and_cross_attention_in_one(model, monkeypatch):
    monkeypatch.setattr("hf_earlyexit.speed.machine_rates.LARGE", 2**21)
    model = copy.deepcopy(model).prepare_for_generation()
    walked = {"batch_size": 2, "source": 5, "new_tokens": 6, "rounds": 2}
    apart, *_ = measure_roofline(model, [[1, 6, 3]], EXITS, "softmax", **walked)
    found, *_ = measure_roofline(model, [[1, 6, 3]], EXITS, "softmax", **walked, compiling=CompileOptions("eager"))
    assert {part.name for part in found.parts} == PARTS - {CROSS}
    work = {part.name: part.bytes for part in apart.parts}
    assert found.parts[0].name == LAYERS and found.parts[0].measured > 0
    assert found.parts[0].bytes == pytest.approx(work[LAYERS] + work[CROSS])
