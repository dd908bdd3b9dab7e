"""Answers for a walk through a real decoder that leaves where a script says, and for the time of its parts.

The walk is `decode_step`'s, greedy and outside `generate`, so that nothing but the decoder is timed. Knows what
parts a decoder has, not what they should cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_earlyexit.cache import EarlyExitCache
from hf_earlyexit.compiling import CompileOptions
from hf_earlyexit.layers import Decoder, decode_step
from hf_earlyexit.policies import ExitCriterion, ExitPoint
from hf_earlyexit.roofline import CATCH_UP, CROSS, HEADS, LAYERS, REST, SOURCE
from hf_earlyexit.run import ExitRun
from hf_earlyexit.settings import ExitSettings
from hf_earlyexit.stopwatch import Stopwatch, clock_on


@dataclass(frozen=True)
class Replay:
    """Criterion: a row leaves from the layer on that a script names; threshold 0.5.

    Attributes:
        layers: `[steps, rows]`, that layer.
        asked: Another criterion that is asked as well, for what asking costs; its answer is not heeded.
    """

    layers: np.ndarray
    asked: ExitCriterion | None = None

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        if self.asked is not None:
            self.asked.confidence(point).tolist()  # an answer is waited for
        sure = [point.layer >= self.layers[at, row] for row, at in zip(point.rows, point.positions, strict=True)]
        return torch.tensor(sure, dtype=torch.float32)


@dataclass(frozen=True)
class Walked:
    """What a walk wrote.

    Attributes:
        tokens: `[rows, steps]`.
        run: With the layers and the work.
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
    """Write as many tokens as the script has steps, always the likeliest, whatever the end token says.

    Args:
        model: In eval mode.
        states: `[rows, source, hidden]`, of the encoder, without padding.
        script: Where rows leave.
        exit_layers: Where they are asked.
        watch: Adds up the parts' time; None: nothing is timed, and nothing is in the way.
        compiling: Run compiled regions, which needs a prepared model; None: its blocks.
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
    """As `generate` makes one."""
    shape = model.decoder_adapter.shape(model)
    sizes = (shape.num_layers, len(states), shape.num_heads, shape.head_dim)
    cache = EarlyExitCache(*sizes, dtype=shape.dtype, device=states.device, capacity=min(steps + 1, 128))
    cache.attach_encoder(states)
    return cache


def source_states(model: Any, rows: int, source: int) -> torch.Tensor:
    """Encoder states `[rows, source, hidden]` of no text in particular: time does not depend on what they say."""
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
    """Seconds of a walk, by part; see `walk`. Compiled, cross-attention is among the layers."""
    watch = Stopwatch(clock_on(states.device), REST)
    walk(model, states, script, exit_layers, watch, compiling)
    return dict(watch.seconds)


def seconds_of(states: torch.Tensor, call: Callable[[], Any]) -> float:
    """Seconds of a call, by the same clock as those of parts."""
    read = clock_on(states.device)
    start = read()
    call()
    return read() - start


def _write(decoder: Decoder, ids: torch.Tensor, cache: EarlyExitCache, run: ExitRun, steps: int) -> torch.Tensor:
    """`[rows, steps]`, the likeliest tokens behind `ids [rows, 1]`."""
    written = []
    for _ in range(steps):
        ids = decode_step(decoder, ids, cache, run)[:, -1].argmax(dim=-1, keepdim=True)
        written.append(ids)
    return torch.cat(written, dim=1)


class TimedDecoder:
    """A family's adapter, its blocks and heads timed; all else is the adapter's own.

    Args:
        decoder: The adapter.
        watch: Where time is added up.
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
    """Time what the adapter's methods do not show: payments and projections of the source, which the cache has made,
    and cross-attention. The clock runs within; adapter, cache and model are left as they were, whatever happens."""
    cache.catch_up = watch.timed(CATCH_UP, cache.catch_up)
    cache.fill_cross = watch.timed(SOURCE, cache.fill_cross)
    try:
        with cross_attention_timed(decoder, watch):
            watch.start()
            yield
            watch.lap()
    finally:
        del cache.catch_up, cache.fill_cross


@contextmanager
def cross_attention_timed(decoder: Decoder, watch: Stopwatch) -> Iterator[None]:
    """Time cross-attention apart from the rest of a block: by its method where the adapter has one, else by hooks on
    the stock blocks' modules. The only place that knows how a block's parts are reached."""
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
        # Also where the module raises, so that what is entered is left.
        hooks.append(block.layer[1].register_forward_hook(lambda module, args, out: watch.leave(), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
