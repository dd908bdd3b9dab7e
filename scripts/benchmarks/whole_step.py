"""Reference time of a step at full depth: the whole step as one CUDA graph, replayed without host work in between."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import GenerationConfig

from hf_earlyexit.families.t5.graphs import GraphedT5Decoder
from hf_earlyexit.kernels.compiling import CompileOptions, static_capacity
from hf_earlyexit.kernels.rows import Rows


REPLAYS, ROUNDS = 20, 9


@torch.no_grad()
def whole_step(model: Any, states: torch.Tensor, new_tokens: int, settings: dict[str, Any]) -> float | None:
    """Seconds of a replay: embedding, every layer, LM head, argmax, and writing the token for the next replay.

    Args:
        model: The prepared model in eval mode.
        states: `[rows, source, hidden]`, the encoder's output.
        new_tokens: Capacity of the cache in new tokens.
        settings: As for `generate`.

    Returns:
        The median over `ROUNDS`; None if CUDA graphs are not recorded.
    """
    compiling = CompileOptions.of(GenerationConfig(**settings), model.device)
    copy = model._copy_for_call(needed=True)
    cache = model._cache_for(None, states, static_capacity(new_tokens + 1), "eager")
    cache.attach_encoder(states)
    decoder = model._new_decoder(copy, cache, compiling=compiling)
    if not isinstance(decoder, GraphedT5Decoder):
        return None
    rows = Rows.everyone(cache.num_rows, cache.device)
    cache.lengths = [new_tokens - 1] * cache.num_rows  # the last position, where attention reads most
    decoder.begin_step(rows, cache, 1)
    ids = torch.full((len(rows), 1), 5, device=cache.device)
    decoder.run_blocks(range(1, decoder.num_layers + 1), decoder.embed(ids, rows), rows, cache)
    replay = decoder.workspace.graph(
        ("whole step", compiling, len(rows), decoder.keys), lambda: step(decoder, len(rows))
    )
    return median(seconds_of(replay, cache.device) for _ in range(ROUNDS)) / REPLAYS


def step(decoder: GraphedT5Decoder, rows: int) -> None:
    """The recorded work. Each replay reads the tokens that the previous one wrote, always at the last position."""
    layers = range(1, decoder.num_layers + 1)
    decoder._segment(layers, decoder._size(rows), rows == decoder.room, decoder.keys, None)
    states, _ = decoder._after(layers[-1])
    logits = decoder.lm_head(decoder.head_input(layers[-1], states[:rows]))
    decoder.workspace.buffers["ids"][:rows].copy_(logits.argmax(dim=-1))


def seconds_of(replay: Callable[[], None], device: torch.device) -> float:
    """Seconds of `REPLAYS` replays, measured with CUDA events."""
    torch.cuda.set_device(device)
    replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(REPLAYS):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
