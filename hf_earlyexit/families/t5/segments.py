"""Segments of T5 decoder layers as functions of tensors, each compiled by `torch.compile` to one graph.

A segment evaluates no exit and writes no cache: missing keys and values are filled before it runs. The shapes of its
arguments and results depend only on its number of layers and the bucket of its rows. Weights are arguments, so
segments of equal length share a graph. The compiler also fuses the selection of rows, which then copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from hf_earlyexit.exits.criteria import at_least_float32


# The weights `[out, in]` of linear maps of the same input, as the model holds them.
LinearMap = tuple[torch.Tensor, ...]


class SegmentLayer(NamedTuple):
    """One layer's weights; norms are given by their scales."""

    norm: torch.Tensor
    query_keys_values: LinearMap
    output: LinearMap
    cross_norm: torch.Tensor
    cross_query: LinearMap
    cross_output: LinearMap
    feed_norm: torch.Tensor
    feed_in: LinearMap
    feed_out: LinearMap


class Past(NamedTuple):
    """Keys and values of one layer, for all rows of the batch, as the cache holds them."""

    keys: torch.Tensor  # [batch, heads, capacity, head]
    values: torch.Tensor
    cross_keys: torch.Tensor  # [batch, heads, source, head]
    cross_values: torch.Tensor


class Present(NamedTuple):
    """Inputs that all layers of a step share."""

    rows: torch.Tensor  # [bucket], the batch row of each state
    positions: torch.Tensor  # [bucket], the position of each state
    bias: torch.Tensor  # [1 or bucket, heads, capacity], later positions masked
    cross_bias: torch.Tensor  # [bucket, 1, source]


class Segment:
    """`(states, layers, pasts, present) -> states, the states before the last layer, keys and values`.

    Args:
        activation: Activation of the feed-forward part.
        is_gated: Whether the feed-forward part is gated.
        epsilon: Epsilon of the norms.
        num_heads: Heads of self- and cross-attention.
    """

    def __init__(
        self, activation: Callable[[torch.Tensor], torch.Tensor], is_gated: bool, epsilon: float, num_heads: int
    ):
        self.activation, self.is_gated = activation, is_gated
        self.epsilon, self.num_heads = epsilon, num_heads

    def __call__(
        self, states: torch.Tensor, layers: Sequence[SegmentLayer], pasts: Sequence[Past], present: Present
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See the class; `states [bucket, hidden]`, keys and values `[2, layers, bucket, heads, head]`."""
        keys, values, previous = [], [], states
        for layer, past in zip(layers, pasts, strict=True):
            previous = states
            states, key, value = self.layer(states, layer, past, present)
            keys.append(key)
            values.append(value)
        return states, previous, torch.stack([torch.stack(keys), torch.stack(values)])

    def layer(self, states: torch.Tensor, layer: SegmentLayer, past: Past, present: Present):
        """One layer: the states after it, and its new keys and values `[bucket, heads, head]`."""
        projected = apply(layer.query_keys_values, self.normed(states, layer.norm))
        query, key, value = (self.by_head(part) for part in projected.chunk(3, dim=-1))
        context = attend_self(query, key, value, past, present)
        states = states + apply(layer.output, context.flatten(1))
        query = self.by_head(apply(layer.cross_query, self.normed(states, layer.cross_norm)))
        source = (past.cross_keys[present.rows], past.cross_values[present.rows])
        context = attend(query, *source, present.cross_bias)
        states = states + apply(layer.cross_output, context.flatten(1))
        return states + self.feed_forward(self.normed(states, layer.feed_norm), layer), key, value

    def feed_forward(self, normed: torch.Tensor, layer: SegmentLayer) -> torch.Tensor:
        inner = apply(layer.feed_in, normed)
        if self.is_gated:
            gate, inner = inner.chunk(2, dim=-1)
            inner = self.activation(gate) * inner
        else:
            inner = self.activation(inner)
        return apply(layer.feed_out, inner)

    def normed(self, states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        wide = at_least_float32(states)
        variance = wide.square().mean(-1, keepdim=True)
        return (wide * torch.rsqrt(variance + self.epsilon)).to(scale.dtype) * scale

    def by_head(self, projected: torch.Tensor) -> torch.Tensor:
        """`[bucket, heads, head]`."""
        return projected.reshape(projected.shape[0], self.num_heads, -1)


# --- the heavy operations --------------------------------------------------------------------------------------------


def apply(weights: LinearMap, rows: torch.Tensor) -> torch.Tensor:
    """`[rows, out]`, the outputs of the linear maps on `rows`, concatenated."""
    if rows.is_cpu and rows.shape[0] == 1:
        # For one row, the loop compiled from a sum of products takes half the time of a library's matrix product.
        wide = at_least_float32(rows)
        return torch.cat([(at_least_float32(weight) * wide).sum(-1) for weight in weights])[None].to(rows.dtype)
    return torch.cat([linear(rows, weight) for weight in weights], dim=-1)


def attend_self(query, key, value, past: Past, present: Present) -> torch.Tensor:
    """`[bucket, heads, head]`: attention to past positions and to the present key and value."""
    places = torch.arange(past.keys.shape[2], device=query.device)
    is_present = (places == present.positions[:, None])[:, None, :, None]
    keys = torch.where(is_present, key[:, :, None], past.keys[present.rows])
    values = torch.where(is_present, value[:, :, None], past.values[present.rows])
    return attend(query, keys, values, present.bias)


def attend(query, keys, values, bias: torch.Tensor) -> torch.Tensor:
    """Attention of one position as sums of products, into which the compiler fuses the selection of rows."""
    scores = (at_least_float32(query)[:, :, None] * at_least_float32(keys)).sum(-1)
    weights = torch.softmax(scores + bias, dim=-1)
    return (weights[..., None] * at_least_float32(values)).sum(2).to(query.dtype)
