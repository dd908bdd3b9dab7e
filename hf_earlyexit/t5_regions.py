"""Answers for stretches of T5 decoder layers as functions of tensors that `torch.compile` makes one graph of.

A region decides nothing: debts are paid before it is entered, and what it is handed and hands back has a shape that
depends only on its number of layers and the bucket of its rows. Of the cache it may use the place of the present
position as scratch; what stays there the cache writes. Weights are arguments, so equally long regions share a graph.
One row on a CPU is generated code throughout, which reads a weight at the speed of the memory; more rows there call
oneDNN and the library's attention on views of the cache, as custom operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from hf_earlyexit.policies import at_least_float32


class RegionMap(NamedTuple):
    """A linear map without bias: the model's weights, to be joined, and the same laid out for a few rows."""

    weights: tuple[torch.Tensor, ...]
    packed: torch.Tensor | None
    out_features: int


class RegionLayer(NamedTuple):
    """One layer's weights; norms are their scales."""

    norm: torch.Tensor
    query_keys_values: RegionMap
    output: RegionMap
    cross_norm: torch.Tensor
    cross_query: RegionMap
    cross_output: RegionMap
    feed_norm: torch.Tensor
    feed_in: RegionMap
    feed_out: RegionMap


class Past(NamedTuple):
    """What one layer attends to, of all rows of the batch, as the cache holds it."""

    keys: torch.Tensor  # [batch, heads, capacity, head]
    values: torch.Tensor
    cross_keys: torch.Tensor  # [batch, heads, source, head]
    cross_values: torch.Tensor


class Present(NamedTuple):
    """What all layers of a step share."""

    rows: torch.Tensor  # [bucket], which row of the batch each state is of
    positions: torch.Tensor  # [bucket], the position each is at
    bias: torch.Tensor  # [1 or bucket, heads, capacity], later positions shut out
    cross_bias: torch.Tensor  # [bucket, 1, source]


class Region:
    """`(states, layers, pasts, present) -> states, the states before the last layer, keys and values`.

    Args:
        activation: Of the feed-forward part.
        is_gated: Whether that part is.
        epsilon: Of the norms.
        num_heads: Of both attentions.
    """

    def __init__(
        self, activation: Callable[[torch.Tensor], torch.Tensor], is_gated: bool, epsilon: float, num_heads: int
    ):
        self.activation, self.is_gated = activation, is_gated
        self.epsilon, self.num_heads = epsilon, num_heads

    def __call__(
        self, states: torch.Tensor, layers: Sequence[RegionLayer], pasts: Sequence[Past], present: Present
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the class says; `states [bucket, hidden]`, keys and values `[2, layers, bucket, heads, head]`."""
        keys, values, previous = [], [], states
        for layer, past in zip(layers, pasts):
            previous = states
            states, key, value = self.layer(states, layer, past, present)
            keys.append(key)
            values.append(value)
        return states, previous, torch.stack([torch.stack(keys), torch.stack(values)])

    def layer(self, states: torch.Tensor, layer: RegionLayer, past: Past, present: Present):
        """One layer: the states after it, and its new keys and values `[bucket, heads, head]`."""
        projected = apply(layer.query_keys_values, self.normed(states, layer.norm))
        query, key, value = (self.by_head(part) for part in projected.chunk(3, dim=-1))
        context = attend_self(query, key, value, past, present)
        states = states + apply(layer.output, context.flatten(1))
        query = self.by_head(apply(layer.cross_query, self.normed(states, layer.cross_norm)))
        context = attend_source(query, past, present)
        states = states + apply(layer.cross_output, context.flatten(1))
        return states + self.feed_forward(self.normed(states, layer.feed_norm), layer), key, value

    def feed_forward(self, normed: torch.Tensor, layer: RegionLayer) -> torch.Tensor:
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


# --- the heavy operations, each in the way that suits the device and the number of rows -----------------------------


def generates(states: torch.Tensor) -> bool:
    """Whether everything is left to the compiler: on an accelerator, and for one row on a CPU."""
    return not states.is_cpu or states.shape[0] == 1


def apply(linear_map: RegionMap, rows: torch.Tensor) -> torch.Tensor:
    """`[rows, out]`."""
    if rows.is_cpu and rows.shape[0] == 1:
        # A sum of products is compiled to a loop that takes half the time of a library's matrix product with one row.
        wide = at_least_float32(rows)
        return torch.cat([(at_least_float32(weight) * wide).sum(-1) for weight in linear_map.weights])[None].to(
            rows.dtype
        )
    if linear_map.packed is not None:
        return torch.ops.hf_earlyexit.packed_linear(rows, linear_map.packed, linear_map.out_features)
    return torch.cat([linear(rows, weight) for weight in linear_map.weights], dim=-1)


def attend_self(query, key, value, past: Past, present: Present) -> torch.Tensor:
    """`[bucket, heads, head]`: attention to the past and to the present key and value."""
    if not generates(query):
        where = (present.rows, present.positions, present.bias)
        return torch.ops.hf_earlyexit.attend_self(query, key, value, past.keys, past.values, *where)
    places = torch.arange(past.keys.shape[2], device=query.device)
    is_present = (places == present.positions[:, None])[:, None, :, None]
    keys = torch.where(is_present, key[:, :, None], past.keys[present.rows])
    values = torch.where(is_present, value[:, :, None], past.values[present.rows])
    return generated_attention(query, keys, values, present.bias)


def attend_source(query, past: Past, present: Present) -> torch.Tensor:
    """`[bucket, heads, head]`: attention to the source."""
    keys, values = past.cross_keys, past.cross_values
    if not generates(query):
        return torch.ops.hf_earlyexit.attend_source(query, keys, values, present.rows, present.cross_bias)
    return generated_attention(query, keys[present.rows], values[present.rows], present.cross_bias)


def generated_attention(query, keys, values, bias: torch.Tensor) -> torch.Tensor:
    """Attention of one position as sums of products, into which the choice of rows is compiled without a copy."""
    scores = (at_least_float32(query)[:, :, None] * at_least_float32(keys)).sum(-1)
    weights = torch.softmax(scores + bias, dim=-1)
    return (weights[..., None] * at_least_float32(values)).sum(2).to(query.dtype)


# --- custom operations ----------------------------------------------------------------------------------------------

LIBRARY = torch.library.Library("hf_earlyexit", "DEF")
LIBRARY.define("packed_linear(Tensor rows, Tensor weight, int out_features) -> Tensor")
LIBRARY.define(
    "attend_self(Tensor query, Tensor key, Tensor value, Tensor keys, Tensor values, Tensor rows, "
    "Tensor positions, Tensor bias) -> Tensor"
)
LIBRARY.define("attend_source(Tensor query, Tensor keys, Tensor values, Tensor rows, Tensor bias) -> Tensor")


def packed_linear(rows: torch.Tensor, weight: torch.Tensor, out_features: int) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")


def attend_self_on_views(query, key, value, keys, values, rows, positions, bias) -> torch.Tensor:
    """Attends to what each row holds and to the present, for which it uses the present's own place among the keys.

    Not declared as a mutation: nothing else in a region reads that place, and the cache writes there what this does.
    Declared, the compiler would copy the arena, of which all layers' keys and values are views.
    """
    keys[rows, :, positions], values[rows, :, positions] = key, value
    length = int(positions.max()) + 1
    return attend_on_views(query, keys[:, :, :length], values[:, :, :length], rows, bias[..., :length])


def attend_on_views(query, keys, values, rows, bias) -> torch.Tensor:
    """One call of the library's attention per run of neighbouring rows."""
    context = torch.empty_like(query)
    for start, stop, first in runs_of(rows.tolist()):
        mask = bias if bias.shape[0] == 1 else bias[start:stop]
        batch = slice(first, first + stop - start)
        parts, mask = (query[start:stop, :, None], keys[batch], values[batch]), mask[:, :, None].to(query.dtype)
        context[start:stop] = scaled_dot_product_attention(*parts, attn_mask=mask, scale=1.0)[:, :, 0]
    return context


def runs_of(rows: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of neighbours among `rows`: where each starts and stops in the list, and its first row."""
    starts = [place for place, row in enumerate(rows) if place == 0 or row != rows[place - 1] + 1]
    return [(start, stop, rows[start]) for start, stop in zip(starts, [*starts[1:], len(rows)])]


for key in ("CPU", "MkldnnCPU"):
    LIBRARY.impl("packed_linear", packed_linear, key)
LIBRARY.impl("attend_self", attend_self_on_views, "CPU")
LIBRARY.impl("attend_source", attend_on_views, "CPU")
torch.library.register_fake(
    "hf_earlyexit::packed_linear", lambda rows, weight, out: rows.new_empty(rows.shape[0], out)
)
torch.library.register_fake("hf_earlyexit::attend_self", lambda query, *others: torch.empty_like(query))
torch.library.register_fake("hf_earlyexit::attend_source", lambda query, *others: torch.empty_like(query))
