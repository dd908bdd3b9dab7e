"""Answers for running stretches of T5 layers through compiled regions (`t5_regions.py`) over an `EarlyExitCache`.

On a CPU a single row does, everything else runs through the prepared layers: with more rows a stretch is bound by
products that are packed there anyway, and compiled it was 12 % slower. Elsewhere every step does, and prompts, which
are longer than one position, do not. All else is `PreparedT5Decoder`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import torch
from torch import nn
from torch.nn.functional import pad

from hf_earlyexit.cache import EarlyExitCache
from hf_earlyexit.compiling import CompileOptions
from hf_earlyexit.rows import Rows
from hf_earlyexit.t5_prepared import PreparedT5, PreparedT5Decoder
from hf_earlyexit.t5_regions import LinearMap, Past, Present, Region, RegionLayer
from hf_earlyexit.transfer import to_device


# Longer stretches are several calls of one graph: a graph of 4 layers takes a quarter of a minute to compile, a call
# costs a few per cent of the time of 4 layers.
LONGEST_REGION = 4


class CompiledT5Decoder(PreparedT5Decoder):
    """The adapter of T5 on compiled regions.

    Args:
        options: How regions are compiled; what was compiled before with the same ones is used again.
    """

    def __init__(self, prepared: PreparedT5, options: CompileOptions, model: nn.Module, cache: EarlyExitCache, *masks):
        super().__init__(prepared, model, cache, *masks)
        self.prepared, self.options = prepared, options
        self.most_rows = most_rows(cache)

    def run_blocks(
        self, layers: range, hidden: torch.Tensor, rows: Rows, cache: EarlyExitCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if len(rows) > self.most_rows:
            return super().run_blocks(layers, hidden, rows, cache)
        for layer in layers:
            cache.fill_cross(layer, rows, self.project_source)
        if rows is not self.present_rows:
            self.present_rows, self.present = rows, self._present(rows, cache)
        # Graphs are kept apart by whether an argument is a view, so none of what changes from step to step is one.
        states = previous = filled_up(hidden[:, 0], bucket(len(rows))).clone()
        for first in range(layers.start, layers.stop, LONGEST_REGION):
            part = range(first, min(first + LONGEST_REGION, layers.stop))
            weights = [self.region_layers[layer - 1] for layer in part]
            pasts = [self._past(layer, cache) for layer in part]
            torch._dynamo.mark_static(states, 0)
            region = compiled_region(self.prepared, self.options, self.model, len(part), len(states))
            states, previous, keys_values = region(states, weights, pasts, self.present)
            cache.write_layers(part, rows, keys_values[:, :, : len(rows)])
        return states[: len(rows), None], previous[: len(rows), None]

    def begin_step(self, rows: Rows, cache: EarlyExitCache, length: int) -> None:
        super().begin_step(rows, cache, length)
        self.present_rows = None

    @cached_property
    def region_layers(self) -> list[RegionLayer]:
        return [region_layer(block) for block in self.blocks]

    def _present(self, rows: Rows, cache: EarlyExitCache) -> Present:
        """What the layers of this step share for these rows."""
        self._follow(rows)
        size = bucket(len(rows))
        index = filled_up(rows.index, size)
        positions = filled_up(to_device([cache.lengths[row] for row in rows], cache.device), size)
        bias = self.row_self_bias[:, :, 0]
        later = cache.capacity - bias.shape[-1]
        bias = pad(bias, (0, later), value=torch.finfo(bias.dtype).min)
        bias = bias if bias.shape[0] == 1 else filled_up(bias, size)
        # There always is one, and of every row, so that a padded source does not need other graphs.
        cross_bias = filled_up(self.row_cross_mask[:, :, 0].expand(len(rows), -1, -1), size).clone(
            memory_format=torch.contiguous_format
        )
        return Present(index, positions, of_any_size(bias, -1), of_any_size(cross_bias, -1))

    def _past(self, layer: int, cache: EarlyExitCache) -> Past:
        """What a layer attends to; kept, since it is the same tensors at every step."""
        keys = cache.keys
        if self.pasts_of is not keys:
            self.pasts_of, self.pasts = keys, {}
        if layer not in self.pasts:
            arena = (cache.keys[layer - 1], cache.values[layer - 1])
            parts = (*arena, cache.cross_keys[layer - 1], cache.cross_values[layer - 1])
            self.pasts[layer] = Past(*(of_any_size(part, 0, 2) for part in parts))
        return self.pasts[layer]

    pasts_of: torch.Tensor | None = None

    def warm_up(self, stretches: Iterable[range], cache: EarlyExitCache) -> Iterator[None]:
        """Compile what stretches like these need for any number of rows of the batch; yields after each graph."""
        batch, width = cache.num_rows, cache.encoder_states.shape[-1]
        sizes = {bucket(rows): rows for rows in range(self.most_rows, 0, -1)}
        for rows in (Rows(range(count), batch, cache.device) for count in sizes.values()):
            self.begin_step(rows, cache, 1)
            for stretch in {len(stretch): stretch for stretch in stretches}.values():
                hidden = cache.encoder_states.new_zeros(len(rows), 1, width)
                self.run_blocks(stretch, hidden, rows, cache)
                yield


def most_rows(cache: EarlyExitCache) -> int:
    """Up to how many rows regions take."""
    return 1 if cache.device.type == "cpu" else cache.num_rows


def bucket(rows: int) -> int:
    """How many rows a graph is run with: the next power of two."""
    return 1 << (rows - 1).bit_length()


def of_any_size(tensor: torch.Tensor, *dimensions: int) -> torch.Tensor:
    """The tensor, marked to be compiled for all sizes of these dimensions but 0 and 1, which have their own graphs."""
    for dimension in {dimension % tensor.dim() for dimension in dimensions}:
        if tensor.shape[dimension] > 1:
            torch._dynamo.mark_dynamic(tensor, dimension)
    return tensor


def filled_up(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """The tensor with its last row repeated until there are `size`; what is computed for a copy is thrown away."""
    missing = size - len(tensor)
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) if missing else tensor


def region_layer(block: nn.Module) -> RegionLayer:
    """The weights of a layer as a region takes them."""
    attention, cross, feed = block.layer[0].SelfAttention, block.layer[1].EncDecAttention, block.layer[2]
    dense = feed.DenseReluDense
    return RegionLayer(
        norm=block.layer[0].layer_norm.weight.detach(),
        query_keys_values=weights_of(attention.q, attention.k, attention.v),
        output=weights_of(attention.o),
        cross_norm=block.layer[1].layer_norm.weight.detach(),
        cross_query=weights_of(cross.q),
        cross_output=weights_of(cross.o),
        feed_norm=feed.layer_norm.weight.detach(),
        feed_in=weights_of(dense.wi_0, dense.wi_1) if hasattr(dense, "wi_0") else weights_of(dense.wi),
        feed_out=weights_of(dense.wo),
    )


def weights_of(*maps: nn.Linear) -> LinearMap:
    """The weights of maps of the same input, the model's own, without gradients."""
    return tuple(one.weight.detach() for one in maps)


def compiled_region(
    prepared: PreparedT5, options: CompileOptions, model: nn.Module, layers: int, rows: int
) -> Callable:
    """The region function of a T5 for so many layers and rows, compiled once per prepared copy and options."""
    key = (options, layers, rows)
    if key not in prepared.compiled:
        config = model.config
        activation = prepared.layers[0].activation
        region = Region(activation, config.is_gated_act, config.layer_norm_epsilon, config.num_heads)
        prepared.compiled[key] = options.compile(region)
    return prepared.compiled[key]
