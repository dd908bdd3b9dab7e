"""T5 decoder layers in few operations, on a prepared copy of the weights.

The copy fuses projections of the same input and is laid out for few rows (`kernels/packing.py`). A layer computes what
the stock block computes in eval mode, rounded differently. Everything else is `T5Decoder`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, rms_norm
from transformers.activations import NewGELUActivation

from hf_earlyexit.common.transfer import settle
from hf_earlyexit.decoding.cache import EarlyExitCache
from hf_earlyexit.exits.criteria import at_least_float32
from hf_earlyexit.exits.heads import NormHead
from hf_earlyexit.families.t5.decoder import T5Decoder
from hf_earlyexit.families.t5.structure import (
    modules_of,
    passed_by,
    refuse_other_forwards,
    refuse_other_norms,
    replaced_modules,
)
from hf_earlyexit.generation.plain import described, has_dense_weight, is_hooked
from hf_earlyexit.kernels.attention import attend, sdpa
from hf_earlyexit.kernels.kernel_switch import optional_kernels
from hf_earlyexit.kernels.packing import PackedLinear, at_least_a_tile, packs
from hf_earlyexit.kernels.rows import Rows


class PreparedLayer:
    """The weights of one decoder layer."""

    def __init__(self, block: nn.Module):
        attention, cross, feed = block.layer[0].SelfAttention, block.layer[1].EncDecAttention, block.layer[2]
        dense = feed.DenseReluDense
        self.norm, self.cross_norm, self.feed_norm = (Norm(part.layer_norm) for part in block.layer)
        self.query_keys_values = packed(attention.q, attention.k, attention.v)
        self.keys_values = packed(attention.k, attention.v)  # to backfill missing keys and values
        self.output = packed(attention.o)
        self.cross_query, self.cross_output = packed(cross.q), packed(cross.o)
        self.is_gated = hasattr(dense, "wi_0")
        self.feed_in = packed(dense.wi_0, dense.wi_1) if self.is_gated else packed(dense.wi)
        self.feed_out = packed(dense.wo)
        self.activation = faster(dense.act)


class Norm:
    """A root-mean-square norm in four operations, on CUDA in one or two, with or without its scale."""

    def __init__(self, norm: nn.Module, scaled: bool = True, factor: float = 1.0):
        width = norm.weight.shape[0]
        # sqrt(mean(x^2) + epsilon) = hypot(|x|, sqrt(width * epsilon)) / sqrt(width); the factor sqrt(width) is part
        # of the scale.
        epsilon = next(getattr(norm, name) for name in ("variance_epsilon", "epsilon", "eps") if hasattr(norm, name))
        self.floor = at_least_float32(norm.weight.new_tensor((width * epsilon) ** 0.5))
        weight = at_least_float32(norm.weight.detach())
        self.scale = (weight if scaled else torch.ones_like(weight)) * (factor * width**0.5)
        self.is_half = weight.dtype != norm.weight.dtype
        self.weight = norm.weight.detach() if scaled else torch.ones_like(norm.weight)
        self.epsilon, self.factor = epsilon, factor

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden]`, in the dtype of `states`."""
        if states.is_cuda:
            normed = rms_norm(states, self.weight.shape, self.weight, self.epsilon)
            return normed if self.factor == 1 else normed * self.factor
        wide = states.float() if self.is_half else states
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        normed = wide / length.hypot_(self.floor) * self.scale
        return normed.to(states.dtype) if self.is_half else normed


class PreparedT5:
    """A prepared copy of a T5 decoder's weights. Small weights and those without a packed layout are shared instead.

    Args:
        model: An `EarlyExitT5ForConditionalGeneration` that `refuse_unless_plain` accepts.
    """

    def __init__(self, model: nn.Module):
        with torch.no_grad():
            self.layers = [PreparedLayer(block) for block in model.decoder.block]
            self.lm_head = packed(model.lm_head)
            self.stacked_norm = Norm(model.decoder.block[0].layer[0].layer_norm, scaled=False)
        self.exit_norms = exit_norms(model)
        self.blocks = model.decoder.block
        settle(model.device)
        self.stacks: dict[int, PackedLinear] = {}
        self.compiled: dict[Hashable, Callable] = {}
        self.graphed: Any = None  # a `GraphedT5` (`families/t5/graphs.py`), where graphs are recorded

    def stacked(self, first: int) -> PackedLinear:
        """One linear map to the keys and values of all layers from `first` on, with the norms' scales folded in.

        Made when rows first exit after layer `first - 1`.
        """
        if first not in self.stacks:
            weight = self.blocks[0].layer[0].SelfAttention.k.weight
            if packs(weight.dtype, weight.device):
                self.stacks[first] = PackedLinear(self._folded(first))
            else:  # a slice of the whole stack, without a copy
                self.stacks[first] = PackedLinear(self._whole_stack[2 * weight.shape[0] * (first - 1) :])
        return self.stacks[first]

    @cached_property
    def _whole_stack(self) -> torch.Tensor:
        """`_folded` for all layers."""
        folded = self._folded(1)
        settle(folded.device)
        return folded

    @torch.no_grad()
    def _folded(self, first: int) -> torch.Tensor:
        """Key and value weights of all layers from `first` on, concatenated and multiplied by the norms' scales."""
        parts = [block.layer[0] for block in self.blocks[first - 1 :]]
        folded = [
            at_least_float32(one.weight) * at_least_float32(part.layer_norm.weight)
            for part in parts
            for one in (part.SelfAttention.k, part.SelfAttention.v)
        ]
        return torch.cat(folded).to(parts[0].SelfAttention.k.weight.dtype)


class PreparedT5Decoder(T5Decoder):
    """The T5 adapter on a prepared copy; see `T5Decoder` for the arguments."""

    def __init__(self, prepared: PreparedT5, *args):
        super().__init__(*args)
        self.prepared = prepared

    def run_block(self, layer: int, hidden: torch.Tensor, rows: Rows, cache: EarlyExitCache) -> torch.Tensor:
        # Use this class's layers also in subclasses that run segments of a single position differently.
        return PreparedT5Decoder.run_blocks(self, range(layer, layer + 1), hidden, rows, cache)[0]

    def run_blocks(
        self, layers: range, hidden: torch.Tensor, rows: Rows, cache: EarlyExitCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if rows is not self.view.self_attention_cache.rows:
            self._follow(rows)
        states = at_least_a_tile(hidden.flatten(0, 1))
        for layer in layers:
            cache.fill_cross(layer, rows, self.project_source)
            previous = states
            states = self.self_attention(layer, states, rows, cache)
            states = self.cross_attention(layer, states, rows, cache)
            states = self.feed_forward(layer, states)
        count = hidden.shape[:-1].numel()
        return states[:count].view(hidden.shape), previous[:count].view(hidden.shape)

    def self_attention(self, layer: int, states: torch.Tensor, rows: Rows, cache: EarlyExitCache) -> torch.Tensor:
        """`states [rows x length, hidden]` plus the output of self-attention; writes the rows' keys and values."""
        weights = self.prepared.layers[layer - 1]
        parts = self._by_head(weights.query_keys_values(weights.norm(states)), rows, 3)
        query = parts[0]
        if self.new_positions == 1:
            cache.write_layers(range(layer, layer + 1), rows, parts[1:, None, :, :, 0])
        else:
            cache.write(layer, rows, *parts[1:])
        keys, values = cache.view(layer, rows, self.view.self_attention_cache.length)
        return states + weights.output(self._attend(query, keys, values, rows, self.row_self_bias))

    def cross_attention(self, layer: int, states: torch.Tensor, rows: Rows, cache: EarlyExitCache) -> torch.Tensor:
        """`states [rows x length, hidden]` plus the output of cross-attention."""
        weights = self.prepared.layers[layer - 1]
        query = self._by_head(weights.cross_query(weights.cross_norm(states)), rows, 1)[0]
        mask = self.row_cross_mask if self.pads_source else None  # None is faster than a mask without padding
        return states + weights.cross_output(self._attend(query, *cache.cross_view(layer, rows), rows, mask))

    def feed_forward(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """`states [rows x length, hidden]` plus the output of the feed-forward part."""
        weights = self.prepared.layers[layer - 1]
        inner = weights.feed_in(weights.feed_norm(states))
        if weights.is_gated:
            gate, inner = inner.chunk(2, dim=-1)
            inner = weights.activation(gate).mul_(inner)
        else:
            inner = weights.activation(inner)
        return states + weights.feed_out(inner)

    def _by_head(self, projected: torch.Tensor, rows: Rows, parts: int) -> torch.Tensor:
        """`[parts, rows, heads, length, head]` from `projected [at least rows x length, parts x heads x head]`."""
        length = self.new_positions
        heads = projected[: len(rows) * length].view(len(rows), length, parts, -1, self.head_dim)
        return heads.permute(2, 0, 3, 1, 4)

    def _attend(self, query, keys, values, rows: Rows, bias: torch.Tensor | None) -> torch.Tensor:
        """`[at least rows x length, heads x head]`."""
        context = attend(sdpa, None, query, keys, values, rows, bias, scaling=1.0)
        return at_least_a_tile(context.reshape(len(rows) * self.new_positions, -1))

    def begin_step(self, rows: Rows, cache: EarlyExitCache, length: int) -> None:
        self.new_positions, self.head_dim = length, cache.head_dim
        super().begin_step(rows, cache, length)

    def project(self, layer: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = self.prepared.layers[layer - 1]
        keys, values = weights.keys_values(weights.norm(at_least_a_tile(states)))[: len(states)].chunk(2, dim=-1)
        shape = (len(states), -1, self.head_dim)
        return keys.view(shape), values.view(shape)

    def project_layers(self, layers: range, states: torch.Tensor) -> torch.Tensor:
        normed = self.prepared.stacked_norm(at_least_a_tile(states))
        projected = self.prepared.stacked(layers.start)(normed)[: len(states)]
        projected = projected.view(len(states), len(layers), 2, -1, self.head_dim)
        return projected.permute(2, 1, 0, 3, 4)

    def head_input(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        norm = self.prepared.exit_norms.get(layer)
        return super().head_input(layer, hidden) if norm is None else norm(hidden)

    def lm_head(self, head_input: torch.Tensor) -> torch.Tensor:
        return self.prepared.lm_head(at_least_a_tile(head_input))[: len(head_input)]


def packed(*maps: nn.Linear) -> PackedLinear:
    """Linear maps of the same input as one packed map."""
    return PackedLinear(torch.cat([one.weight for one in maps]) if len(maps) > 1 else maps[0].weight)


def exit_norms(model: nn.Module) -> dict[int, Norm]:
    """By layer, the norm that gives the LM head's input, for heads that are only a norm (also the last layer's)."""
    factor = model.model_dim**-0.5 if model.config.scale_decoder_outputs else 1.0
    final, norms = model.decoder.final_layer_norm, {}
    for layer in range(1, len(model.decoder.block) + 1):
        head = model.exit_heads.head_of(layer, final)
        if head is final or type(head) is NormHead:
            norms[layer] = Norm(final if head is final else head.norm, factor=factor)
    return norms


def faster(activation: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same activation as one operation where the library uses many."""
    is_slow = type(activation) is NewGELUActivation and optional_kernels()
    return partial(gelu, approximate="tanh") if is_slow else activation


# --- what can be prepared -------------------------------------------------------------------------------------------


def refuse_unless_plain(model: nn.Module) -> None:
    """Check that a copy of the weights would compute what the decoder's modules compute.

    Raises:
        ValueError: A part of the decoder is not the library's plain one (LoRA, quantised, offloaded, hooked, a
            `forward` of its own, training mode), is in fp16, or the parts have several dtypes; the message names it.
    """
    if problems := passed_by(model):
        raise ValueError(f"`prepare_for_generation` does not go with {'; '.join(problems)}.")
    for name, module in (("lm_head", model.lm_head), *_maps_of(model)):
        if type(module) is not nn.Linear or not has_dense_weight(module) or module.bias is not None:
            raise ValueError(
                f"`prepare_for_generation` needs the plain linear maps of T5, but `{name}` is {described(module)}: "
                "merge adapters (`merge_and_unload`), or load unquantised weights into memory."
            )
    refuse_other_norms(model)
    refuse_hooks(model)
    refuse_other_forwards(model)
    dtypes = {parameter.dtype for parameter in (model.lm_head.weight, *model.decoder.parameters())}
    if len(dtypes) > 1 or torch.float16 in dtypes:
        raise ValueError(
            "`prepare_for_generation` does not work in fp16, where T5 keeps parts in fp32, nor with parts of several "
            f"dtypes, found {sorted(map(str, dtypes))}: use `torch.bfloat16` or `torch.float32` for all."
        )


def refuse_hooks(model: nn.Module) -> None:
    """Check that a copy would bypass no hooks, except the library's, which only record hidden states on request.

    Raises:
        ValueError: A module has hooks that would be bypassed; the message names the module.
    """
    if not any(map(is_hooked, modules_of(model.lm_head, model.decoder, model.exit_heads))):
        return
    for name, module in (*replaced_modules(model), *model.decoder.named_modules(prefix="decoder")):
        if is_hooked(module):
            raise ValueError(f"`prepare_for_generation` would not call the hooks of `{name}`: remove them.")


def _maps_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear maps of the decoder, or modules in their place, by name."""
    for number, block in enumerate(model.decoder.block):
        for kind, part in enumerate(block.layer):
            for child_name, child in part.named_children():
                if child_name in ("SelfAttention", "EncDecAttention", "DenseReluDense"):
                    for name in ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"):
                        if hasattr(child, name):
                            yield f"decoder.block.{number}.layer.{kind}.{child_name}.{name}", getattr(child, name)
