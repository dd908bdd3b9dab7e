"""The T5 decoder adapter on the library's blocks: runs one layer, and projects its keys and values.

Adapters are the only code that depends on the internals of the library's models. This one calls a stock block's
`forward` unchanged, with a view of the cache that has the interface of the library's own.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import nn
from transformers import EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.t5.modeling_t5 import eager_attention_forward

from hf_earlyexit.common.library import CACHE
from hf_earlyexit.common.transfer import to_device
from hf_earlyexit.decoding.cache import EarlyExitCache
from hf_earlyexit.decoding.layers import Answer, DecoderShape
from hf_earlyexit.exits.criteria import ExitCriterion
from hf_earlyexit.generation.plain import is_plain_linear
from hf_earlyexit.kernels import attention
from hf_earlyexit.kernels.rows import Rows


attention.register("sdpa", sdpa_attention_forward, attention.sdpa)
attention.register("eager", eager_attention_forward, eager_attention_forward)


class CrossKeysValues(NamedTuple):
    """One layer of a cross-attention cache, as stock T5 reads it."""

    keys: torch.Tensor | None
    values: torch.Tensor | None


class SelfAttentionView:
    """An `EarlyExitCache` with the interface that stock T5 self-attention uses.

    `update` writes the keys and values of `rows` and returns those of the first `length` positions.
    """

    def __init__(self, cache: EarlyExitCache):
        self.cache = cache
        self.rows: Rows | None = None
        self.length = 0  # of the longest row of this step, including new positions

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs):
        layer = layer_idx + 1
        self.cache.write(layer, self.rows, keys, values)
        return self.cache.view(layer, self.rows, self.length)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cache.get_seq_length()


class CrossAttentionView:
    """The interface that stock T5 cross-attention uses: keys and values that are always present."""

    def __init__(self, num_layers: int):
        self.layers = [CrossKeysValues(None, None)] * num_layers


class T5BlockView(EncoderDecoderCache):
    """An `EarlyExitCache` with the interface that a stock `T5Block` uses."""

    def __init__(self, cache: EarlyExitCache):
        self.self_attention_cache = SelfAttentionView(cache)
        self.cross_attention_cache = CrossAttentionView(cache.num_layers)
        self.is_updated = dict.fromkeys(range(cache.num_layers), True)


class T5Decoder:
    """The T5 adapter: v1.0 and v1.1, tied and untied, gated or not.

    Args:
        model: An `EarlyExitT5ForConditionalGeneration`.
        cache: The cache of the call, with encoder states attached.
        encoder_mask: `[batch, source]`, 0 where the source is padding; None for no padding.
        decoder_mask: `[batch, prompt]`, 0 where the decoder prompt is padding; None for no padding.

    Attributes:
        pads_source: Whether any source position of any row is padding. A batch of one row can be padded, too.
        scores_rows: Whether single rows of the LM head's weight can be scored (see `lm_head_rows`).
    """

    def __init__(
        self,
        model: nn.Module,
        cache: EarlyExitCache,
        encoder_mask: torch.Tensor | None,
        decoder_mask: torch.Tensor | None,
    ):
        self.model, self.stack, self.blocks = model, model.decoder, model.decoder.block
        self.num_layers = len(self.blocks)
        self.encoder_states = cache.encoder_states
        self.dtype = model.dtype
        self.view = T5BlockView(cache)
        source = self.encoder_states.shape[1]
        device = self.encoder_states.device
        self.pads_source = is_padded(encoder_mask)
        if self.pads_source:
            self.cross_mask = additive_mask(encoder_mask, self.dtype, device)
        else:
            self.cross_mask = torch.zeros(1, 1, 1, source, dtype=self.dtype, device=device)
        self.prompt_mask = additive_mask(decoder_mask, self.dtype, device) if is_padded(decoder_mask) else None
        self.reversed_bias = torch.empty(0)
        self.scores_rows = is_plain_linear(model.lm_head)
        self.candidates: torch.Tensor | None = None

    @staticmethod
    def shape(model: nn.Module) -> DecoderShape:
        config, blocks = model.config, getattr(model.decoder, "block", None)
        num_layers = config.num_decoder_layers if blocks is None else len(blocks)
        return DecoderShape(num_layers, config.num_heads, config.d_kv, model.dtype)

    def no_logits(self, batch_size: int) -> torch.Tensor:
        return self.encoder_states.new_zeros(batch_size, 1, self.model.config.vocab_size, dtype=self.dtype)

    def embed(self, ids: torch.Tensor, rows: Rows) -> torch.Tensor:
        return self.stack.dropout(self.stack.embed_tokens(rows.select(ids)))

    def begin_step(self, rows: Rows, cache: EarlyExitCache, length: int) -> None:
        if self.reversed_bias.shape[-1] < cache.capacity:
            self.reversed_bias = self._bias_by_distance(cache.capacity)
        self.self_bias = self._self_bias(rows, cache, length)
        self.view.self_attention_cache.length = self.self_bias.shape[-1]
        self._follow(rows)

    def begin_prompt(self, rows: Rows, cache: EarlyExitCache, length: int) -> None:
        self.begin_step(rows, cache, length)

    def look_ahead(self, ids: torch.Tensor, rows: Rows, cache: EarlyExitCache) -> None:
        pass

    def expect(self, criterion: ExitCriterion, exit_points: Collection[int]) -> None:
        pass

    def answer(self, layer: int, rows: Rows) -> Answer | None:
        return None

    def run_block(self, layer: int, hidden: torch.Tensor, rows: Rows, cache: EarlyExitCache) -> torch.Tensor:
        cache.fill_cross(layer, rows, self.project_source)
        if rows is not self.view.self_attention_cache.rows:
            self._follow(rows)
        self.view.cross_attention_cache.layers[layer - 1] = CrossKeysValues(*cache.cross_view(layer, rows))
        return self.blocks[layer - 1](
            hidden,
            None,
            self.row_self_bias,
            self.encoder_states,
            None,
            self.row_cross_mask,
            live_rows=rows,
            **{CACHE: self.view},
        )[0]

    def run_blocks(
        self, layers: range, hidden: torch.Tensor, rows: Rows, cache: EarlyExitCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in layers:
            previous, hidden = hidden, self.run_block(layer, hidden, rows, cache)
        return hidden, previous

    def _follow(self, rows: Rows) -> None:
        """Select masks and bias for `rows`, and make the cache view write to them."""
        self.view.self_attention_cache.rows = rows
        self.row_self_bias = self.self_bias if self.self_bias.shape[0] == 1 else rows.select(self.self_bias)
        self.row_cross_mask = self.cross_mask if self.cross_mask.shape[0] == 1 else rows.select(self.cross_mask)

    def project(self, layer: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        part = self.blocks[layer - 1].layer[0]
        return self._keys_values(part.SelfAttention, part.layer_norm(states))

    def project_layers(self, layers: range, states: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.stack(self.project(layer, states)) for layer in layers], dim=1)

    def project_source(self, layer: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-attention keys and values `[rows, heads, source, head]` of `states [rows, source, hidden]`."""
        keys, values = self._keys_values(self.blocks[layer - 1].layer[1].EncDecAttention, states)
        return keys.transpose(1, 2), values.transpose(1, 2)

    @staticmethod
    def _keys_values(module: nn.Module, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (*states.shape[:-1], module.n_heads, module.key_value_proj_dim)
        return module.k(states).view(shape), module.v(states).view(shape)

    def head_input(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.exit_head_input(layer, hidden)

    def lm_head(self, head_input: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(head_input)

    def lm_head_rows(self, head_input: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        head = self.model.lm_head
        if ids is not self.candidates:  # the same object at all exit points of a step while no row exits
            self.candidates, self.candidate_weights = ids, nn.functional.embedding(ids, head.weight)
        scores = (self.candidate_weights @ head_input[:, :, None])[:, :, 0]
        return scores if head.bias is None else scores + head.bias[ids]

    def exit_probability(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.exit_heads.exit_probability(layer, hidden)

    def _bias_by_distance(self, capacity: int) -> torch.Tensor:
        """Relative bias `[1, heads, 1, capacity]` of keys at distances capacity - 1 to 0, for slicing."""
        module = self.blocks[0].layer[0].SelfAttention
        return module.compute_bias(1, capacity, device=self.encoder_states.device, past_seen_tokens=capacity - 1)

    def _self_bias(self, rows: Rows, cache: EarlyExitCache, length: int) -> torch.Tensor:
        """The bias added to self-attention scores of new positions, `[1 or batch, heads, length, keys]`."""
        starts = {cache.lengths[row] for row in rows}
        keys = max(starts) + length
        if len(starts) == 1 and length == 1:
            bias = self.reversed_bias[..., -keys:].contiguous()
        else:
            bias = self._bias_at([cache.lengths[row] for row in range(cache.num_rows)], length, keys)
        if self.prompt_mask is not None:
            bias = bias + nn.functional.pad(self.prompt_mask, (0, keys - self.prompt_mask.shape[-1]))
        return bias

    def _bias_at(self, starts: list[int], length: int, keys: int) -> torch.Tensor:
        """Relative bias `[batch, heads, length, keys]` of rows that hold `starts` positions, later keys masked."""
        device = self.reversed_bias.device
        positions = to_device(starts, device)[:, None] + torch.arange(length, device=device)
        distance = positions[:, :, None] - torch.arange(keys, device=device)
        bias_by_distance = self.reversed_bias[0, :, 0].flip(-1)
        bias = bias_by_distance[:, distance.clamp(min=0)].transpose(0, 1)
        return bias.masked_fill(distance[:, None] < 0, torch.finfo(bias.dtype).min)


def is_padded(mask: torch.Tensor | None) -> bool:
    """Whether any key is padding. Waits for the device, so it is called once per mask and `generate` call."""
    return mask is not None and not bool(mask.all())


def additive_mask(mask: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`[batch, 1, 1, keys]`, a mask that excludes padding when added to attention scores.

    Args:
        mask: `[batch, keys]`, 0 where a key is padding.
    """
    padding = mask.to(device).bool().logical_not()[:, None, None]
    return torch.zeros(padding.shape, dtype=dtype, device=device).masked_fill_(padding, torch.finfo(dtype).min)
