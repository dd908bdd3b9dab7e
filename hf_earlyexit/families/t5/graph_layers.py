"""A T5 decoder layer for some rows of a batch, as a function of tensors with fixed addresses and shapes.

`families/t5/graphs.py` records it; `torch.compile` may generate its kernels. The function writes new keys and values
into the cache. Attention runs over the whole batch, whichever rows are live: on a GPU its cost is negligible beside
the matrix products, and no key or value is copied. The layer computes what the stock block computes in eval mode,
rounded differently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention

from hf_earlyexit.families.t5.prepared import PreparedLayer


class LayerWeights(NamedTuple):
    """One layer's weights, with projections of the same input fused; norms are given by their scales."""

    norm: torch.Tensor
    query_keys_values: torch.Tensor  # [3 x heads x head, hidden]
    output: torch.Tensor
    cross_norm: torch.Tensor
    cross_query: torch.Tensor
    cross_output: torch.Tensor
    feed_norm: torch.Tensor
    feed_in: torch.Tensor
    feed_out: torch.Tensor


class LayerPast(NamedTuple):
    """Keys and values of one layer, for all rows of the batch."""

    keys_values: torch.Tensor  # [2, batch, heads, capacity, head]
    cross_keys_values: torch.Tensor  # [2, batch, heads, source, head]


class Present(NamedTuple):
    """Inputs that all layers of a step share."""

    rows: torch.Tensor  # [bucket], the batch row of each state
    positions: torch.Tensor  # [bucket], the position of each state
    bias: torch.Tensor  # [batch, heads, 1, keys], added to the scores, later keys masked
    cross_bias: torch.Tensor  # [batch, 1, 1, source], padding masked


class GraphLayer:
    """`(states [bucket, hidden], weights, past, present) -> states`; writes keys and values.

    Args:
        activation: Activation of the feed-forward part.
        is_gated: Whether the feed-forward part is gated.
        epsilon: Epsilon of the norms.
        num_heads: Heads of self- and cross-attention.
        everyone: Whether the states belong to all rows of the batch, in order.
    """

    def __init__(self, activation: Callable, is_gated: bool, epsilon: float, num_heads: int, everyone: bool):
        self.activation, self.is_gated, self.epsilon = activation, is_gated, epsilon
        self.num_heads, self.everyone = num_heads, everyone

    def __call__(self, states: torch.Tensor, weights: LayerWeights, past: LayerPast, present: Present) -> torch.Tensor:
        projected = linear(self.normed(states, weights.norm), weights.query_keys_values)
        parts = projected.view(len(states), 3, self.num_heads, -1)
        past.keys_values.permute(1, 3, 0, 2, 4)[present.rows, present.positions] = parts[:, 1:]
        keys, values = past.keys_values[..., : present.bias.shape[-1], :]
        context = self.attend(parts[:, 0], keys, values, present.bias, present.rows)
        states = states + linear(context, weights.output)
        query = linear(self.normed(states, weights.cross_norm), weights.cross_query)
        context = self.attend(
            query.view(len(states), self.num_heads, -1), *past.cross_keys_values, present.cross_bias, present.rows
        )
        states = states + linear(context, weights.cross_output)
        return states + self.feed_forward(self.normed(states, weights.feed_norm), weights)

    def attend(self, query, keys, values, bias: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`[bucket, heads x head]`: attention of `query [bucket, heads, head]`, each to the keys of its row."""
        if not self.everyone:
            query = query.new_zeros(len(keys), *query.shape[1:]).index_copy(0, rows, query)
        context = scaled_dot_product_attention(query[:, :, None], keys, values, attn_mask=bias, scale=1.0)
        context = context.reshape(len(keys), -1)
        return context if self.everyone else context.index_select(0, rows)

    def feed_forward(self, normed: torch.Tensor, weights: LayerWeights) -> torch.Tensor:
        inner = linear(normed, weights.feed_in)
        if self.is_gated:
            gate, inner = inner.chunk(2, dim=-1)
            inner = self.activation(gate) * inner
        else:
            inner = self.activation(inner)
        return linear(inner, weights.feed_out)

    def normed(self, states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return rms_norm(states, scale.shape, scale, self.epsilon)


def layer_weights(block: torch.nn.Module, prepared: PreparedLayer) -> LayerWeights:
    """The weights of a block; fused ones are shared with the prepared layer."""
    return LayerWeights(
        norm=block.layer[0].layer_norm.weight.detach(),
        query_keys_values=prepared.query_keys_values.plain_weight,
        output=prepared.output.plain_weight,
        cross_norm=block.layer[1].layer_norm.weight.detach(),
        cross_query=prepared.cross_query.plain_weight,
        cross_output=prepared.cross_output.plain_weight,
        feed_norm=block.layer[2].layer_norm.weight.detach(),
        feed_in=prepared.feed_in.plain_weight,
        feed_out=prepared.feed_out.plain_weight,
    )


def self_attention_bias(
    by_distance: torch.Tensor, positions: torch.Tensor, prompt_bias: torch.Tensor, keys: int
) -> torch.Tensor:
    """`[rows, heads, 1, keys]`, the bias added to the scores of queries at `positions [rows]`.

    Args:
        by_distance: `[heads, capacity]`, the relative bias by distance of the key before the query.
        prompt_bias: `[rows, 1, 1, keys]`, excludes padding of decoder prompts.
    """
    distance = positions[:, None] - torch.arange(keys, device=positions.device)
    bias = by_distance[:, distance.clamp(min=0)].transpose(0, 1)[:, :, None]
    bias = (bias + prompt_bias).clamp(min=torch.finfo(bias.dtype).min)
    # Later keys get -inf, unlike padding: a row whose prompt is all padding attends equally to its own keys, but never
    # to later ones.
    return bias.masked_fill(distance[:, None, None] < 0, -torch.inf)
