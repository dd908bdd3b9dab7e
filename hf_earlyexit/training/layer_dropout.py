"""Layer dropout: decoder layers are skipped per row during training (stochastic depth, as in LayerSkip)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class LayerDropout:
    """The rates at which rows skip each block. A skipped block passes its input on; nothing is rescaled.

    Attributes:
        rates: One per block, or empty for none. May be set again before every step.
    """

    def __init__(self):
        self.rates: Sequence[float] = ()

    def run(self, place: int, block: nn.Module, forward, arguments: tuple, keywords: dict):
        """Run the block at `place` on the rows that keep it. Skipped rows pass through without computation."""
        hidden, _, self_bias, *rest = (*arguments, *[None] * (6 - len(arguments)))
        rate = self.rates[place] if block.training and self.rates else 0.0
        if not rate or self_bias is None:  # the first block computes the relative bias that all others use
            return forward(*arguments, **keywords)
        kept = (torch.rand(len(hidden)) >= rate).nonzero()[:, 0].to(hidden.device)
        if len(kept) == len(hidden):
            return forward(*arguments, **keywords)
        if not len(kept):
            return hidden, self_bias, rest[-1]
        narrowed = [_rows(argument, kept, len(hidden)) for argument in arguments]
        changed = forward(*narrowed, **keywords)[0]
        return hidden.to(changed.dtype).index_copy(0, kept, changed), self_bias, rest[-1]


def _rows(argument, kept: torch.Tensor, batch_size: int):
    """The kept rows, if the argument has rows."""
    has_rows = isinstance(argument, torch.Tensor) and argument.shape[0] == batch_size
    return argument[kept] if has_rows else argument


@contextmanager
def layer_dropout(blocks: Sequence[nn.Module]) -> Iterator[LayerDropout]:
    """The layer dropout of these stock T5 blocks, active in training mode until the context ends.

    A block's `forward` is replaced instead of hooked, because a hook cannot keep it from running.
    """
    dropout = LayerDropout()

    def replaced(place: int, block: nn.Module):
        forward = block.forward
        return lambda *arguments, **keywords: dropout.run(place, block, forward, arguments, keywords)

    before = [vars(block).get("forward") for block in blocks]
    for place, block in enumerate(blocks):
        block.forward = replaced(place, block)
    try:
        yield dropout
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
