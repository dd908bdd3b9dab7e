"""Scripted walks through a real decoder, and the time of their parts.

Rows exit where a script says. A walk uses `decode_step`, greedily and outside `generate`, so that only the decoder is
timed. `measure_roofline` walks recorded exits with and without timers and compares them to the machine's limits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import numpy as np
import torch

from hf_earlyexit.decoding.cache import EarlyExitCache
from hf_earlyexit.decoding.layers import Decoder, decode_step
from hf_earlyexit.decoding.run import ExitRun
from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.exits.criteria import CRITERIA, WITH_CANDIDATES, ExitCriterion, ExitPoint
from hf_earlyexit.kernels.compiling import CompileOptions
from hf_earlyexit.speed.machine_rates import MachineRates
from hf_earlyexit.speed.roofline import (
    CATCH_UP,
    CROSS,
    HEADS,
    LAYERS,
    REST,
    SOURCE,
    DecoderSizes,
    Roofline,
    compare,
    parts_of,
    together,
)
from hf_earlyexit.speed.simulation import pieces_of, simulate
from hf_earlyexit.speed.timing import Stopwatch, clock_on, take_turns


@dataclass(frozen=True)
class Replay:
    """Criterion: a row exits from the layer on that a script names; threshold 0.5.

    Attributes:
        layers: `[steps, rows]`, that layer.
        asked: A criterion that is evaluated as well, to include its cost; its result is ignored.
    """

    layers: np.ndarray
    asked: ExitCriterion | None = None

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        if self.asked is not None:
            self.asked.confidence(point).tolist()  # waits for the result, as a real decision does
        sure = [point.layer >= self.layers[at, row] for row, at in zip(point.rows, point.positions, strict=True)]
        return torch.tensor(sure, dtype=torch.float32)


@dataclass(frozen=True)
class Walked:
    """The output of a walk.

    Attributes:
        tokens: `[rows, steps]`.
        run: Records the layers run and the work.
    """

    tokens: torch.Tensor
    run: ExitRun


@torch.no_grad()
def walk(
    model: Any,
    states: torch.Tensor,
    script: Replay,
    exit_layers: Sequence[int],
    watch: Stopwatch | None = None,
    compiling: CompileOptions | None = None,
) -> Walked:
    """Greedily decode as many tokens as the script has steps; EOS tokens do not end a row.

    Args:
        model: In eval mode.
        states: `[rows, source, hidden]`, encoder states without padding.
        script: Where rows exit.
        exit_layers: Where exits are evaluated.
        watch: Adds up the time of each part. None: nothing is timed and no timers are installed.
        compiling: Run compiled segments, which needs a prepared model. None: run the model's blocks.
    """
    settings = ExitSettings(early_exit=True, exit_criterion=script, exit_threshold=0.5)
    rows, steps = len(states), len(script.layers)
    cache = cache_for(model, states, steps)
    decoder = model._new_decoder(model._prepared_copy, cache, compiling=compiling)
    run = ExitRun(settings, frozenset(exit_layers), decoder.num_layers, rows, steps + 1, states.device)
    ids = torch.full((rows, 1), model.config.decoder_start_token_id, device=states.device)
    if watch is None:
        return Walked(_write(decoder, ids, cache, run, steps), run)
    with parts_timed(decoder, cache, watch):
        return Walked(_write(TimedDecoder(decoder, watch), ids, cache, run, steps), run)


def cache_for(model: Any, states: torch.Tensor, steps: int) -> EarlyExitCache:
    """A cache as `generate` creates it."""
    shape = model.decoder_adapter.shape(model)
    sizes = (shape.num_layers, len(states), shape.num_heads, shape.head_dim)
    cache = EarlyExitCache(*sizes, dtype=shape.dtype, device=states.device, capacity=min(steps + 1, 128))
    cache.attach_encoder(states)
    return cache


def source_states(model: Any, rows: int, source: int) -> torch.Tensor:
    """Random encoder states `[rows, source, hidden]`: time does not depend on their content."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, source, model.config.d_model, generator=generator)
    return states.to(model.device, model.decoder_adapter.shape(model).dtype)


def timed(
    model: Any,
    states: torch.Tensor,
    script: Replay,
    exit_layers: Sequence[int],
    compiling: CompileOptions | None = None,
) -> dict[str, float]:
    """Seconds of a walk, by part; see `walk`. In compiled segments, cross-attention counts as part of the layers."""
    watch = Stopwatch(clock_on(states.device), REST)
    walk(model, states, script, exit_layers, watch, compiling)
    return dict(watch.seconds)


def seconds_of(states: torch.Tensor, call: Callable[[], Any]) -> float:
    """Seconds of a call, by the clock that times the parts."""
    read = clock_on(states.device)
    start = read()
    call()
    return read() - start


def _write(decoder: Decoder, ids: torch.Tensor, cache: EarlyExitCache, run: ExitRun, steps: int) -> torch.Tensor:
    """`[rows, steps]`, the most likely tokens after `ids [rows, 1]`."""
    written = []
    for _ in range(steps):
        ids = decode_step(decoder, ids, cache, run)[:, -1].argmax(dim=-1, keepdim=True)
        written.append(ids)
    return torch.cat(written, dim=1)


class TimedDecoder:
    """A decoder adapter with timed blocks and heads. Other attributes come from the adapter.

    Args:
        decoder: The adapter.
        watch: Adds up the times.
    """

    def __init__(self, decoder: Decoder, watch: Stopwatch):
        self.decoder = decoder
        self.run_blocks = watch.timed(LAYERS, decoder.run_blocks)
        self.head_input = watch.timed(HEADS, decoder.head_input)
        self.lm_head = watch.timed(HEADS, decoder.lm_head)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)


@contextmanager
def parts_timed(decoder: Decoder, cache: EarlyExitCache, watch: Stopwatch) -> Iterator[None]:
    """Time the parts outside the adapter's methods: the cache's backfills and source projections, and cross-attention.

    The clock runs inside the block. Adapter, cache and model are restored afterwards, also after an exception.
    """
    cache.backfill = watch.timed(CATCH_UP, cache.backfill)
    cache.fill_cross = watch.timed(SOURCE, cache.fill_cross)
    try:
        with cross_attention_timed(decoder, watch):
            watch.start()
            yield
            watch.lap()
    finally:
        del cache.backfill, cache.fill_cross


@contextmanager
def cross_attention_timed(decoder: Decoder, watch: Stopwatch) -> Iterator[None]:
    """Time cross-attention apart from the rest of a block.

    Wraps the adapter's `cross_attention` if it has one; otherwise hooks the modules of the stock blocks. This is the
    only place that depends on how a block's parts are reached.
    """
    if hasattr(decoder, "cross_attention"):
        decoder.cross_attention = watch.timed(CROSS, decoder.cross_attention)
        try:
            yield
        finally:
            del decoder.cross_attention
        return
    hooks = []
    for block in decoder.blocks:
        hooks.append(block.layer[1].register_forward_pre_hook(lambda module, args: watch.enter(CROSS)))
        # `always_call`: also when the module raises, so that the part is closed.
        hooks.append(block.layer[1].register_forward_hook(lambda module, args, out: watch.leave(), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class WalkTimes:
    """Seconds of walks.

    Attributes:
        parts: By part, timers included.
        untimed: Of the same walks without timers.
    """

    parts: Counter[str] = field(default_factory=Counter)
    untimed: float = 0.0


def measure_roofline(
    model: Any,
    layers_run: Sequence[Sequence[int]],
    exit_layers: Sequence[int],
    criterion: str | None = None,
    *,
    batch_size: int = 1,
    source: int = 64,
    new_tokens: int = 48,
    rounds: int = 5,
    compiling: CompileOptions | None = None,
    after_round: Callable[[], Any] = int,
) -> tuple[Roofline, MachineRates, float]:
    """Measure a decoder and the machine's limits, at the current thread count.

    Args:
        model: In eval mode.
        layers_run: Layers run by every token of some texts. The texts are concatenated and walked in pieces of
            `new_tokens`.
        exit_layers: Where exits are evaluated.
        criterion: The criterion that is evaluated; None: none.
        batch_size: Pieces walked at once.
        source: Source positions of each row.
        new_tokens: Tokens of each piece.
        rounds: Batches of pieces that are timed.
        compiling: Run compiled segments, in which layers and cross-attention are one part; the model must be prepared.
        after_round: Called after each round.

    Returns:
        The comparison, the rates of the machine, and the mean layers per token of the walks.
    """
    depth = model.config.num_decoder_layers
    scripts = pieces_of(layers_run, rounds, batch_size, new_tokens)
    walked = simulate(scripts, depth, exit_layers, scores=bool(exit_layers) and criterion in WITH_CANDIDATES)
    asked = CRITERIA[criterion]() if criterion and exit_layers else None
    states = source_states(model, batch_size, source)
    replays = [Replay(script, asked) for script in scripts]
    times = time_walks(model, states, replays, exit_layers, compiling, after_round)
    dtype = model.decoder_adapter.shape(model).dtype
    sizes = DecoderSizes.of(model.config, dtype.itemsize)
    rates = MachineRates.measure(sizes.weight_bytes, dtype, states.device)
    work = parts_of(sizes, walked, source)
    work = work if compiling is None else together(work, LAYERS, CROSS)
    return compare(work, rates, times.parts, times.untimed, walked.tokens), rates, walked.mean_layers


def time_walks(
    model: Any,
    states: torch.Tensor,
    replays: Sequence[Replay],
    exit_layers: Sequence[int],
    compiling: CompileOptions | None = None,
    after_round: Callable[[], Any] = int,
) -> WalkTimes:
    """Time each script with timers and without, in random order, after a warm-up round with the first script."""
    times = WalkTimes()
    rounds = calls_of_rounds(model, states, replays, exit_layers, times, compiling)
    take_turns(rounds, Random(0), after_round)
    return times


def calls_of_rounds(
    model: Any,
    states: torch.Tensor,
    replays: Sequence[Replay],
    exit_layers: Sequence[int],
    times: WalkTimes,
    compiling: CompileOptions | None = None,
) -> Iterator[dict[str, Callable[[], Any]]]:
    """The calls of each round; the results of the first round are discarded."""

    def with_timers(replay: Replay, into: WalkTimes) -> None:
        into.parts.update(timed(model, states, replay, exit_layers, compiling))

    def without(replay: Replay, into: WalkTimes) -> None:
        into.untimed += seconds_of(states, partial(walk, model, states, replay, exit_layers, None, compiling))

    for replay, into in [(replays[0], WalkTimes()), *((replay, times) for replay in replays)]:
        yield {"timed": partial(with_timers, replay, into), "untimed": partial(without, replay, into)}
