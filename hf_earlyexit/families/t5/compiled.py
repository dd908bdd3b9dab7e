"""T5 decoding with compiled segments (`families/t5/segments.py`) over an `EarlyExitCache`.

On a CPU, only single rows use compiled segments and everything else uses the prepared layers: with more rows, products
with packed weights dominate, and compiled segments were 12 % slower. On other devices every decoding step uses them;
prompts, which are longer than one position, do not. Everything else is `PreparedT5Decoder`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import torch
from torch import nn
from torch.nn.functional import pad

from hf_earlyexit.common.transfer import to_device
from hf_earlyexit.decoding.cache import EarlyExitCache
from hf_earlyexit.families.t5.prepared import PreparedT5, PreparedT5Decoder
from hf_earlyexit.families.t5.segments import LinearMap, Past, Present, Segment, SegmentLayer
from hf_earlyexit.kernels.compiling import CompileOptions
from hf_earlyexit.kernels.rows import Rows


# Longer segments are split into several calls: a graph of 4 layers takes about 15 seconds to compile, and a call costs
# a few per cent of the time of 4 layers.
LONGEST_SEGMENT = 4


class CompiledT5Decoder(PreparedT5Decoder):
    """The T5 adapter on compiled segments.

    Args:
        options: How segments are compiled; segments compiled before with the same options are reused.
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
        # The compiler specialises graphs on whether an argument is a view, so no argument that changes by step is one.
        states = previous = filled_up(hidden[:, 0], bucket(len(rows))).clone()
        for first in range(layers.start, layers.stop, LONGEST_SEGMENT):
            part = range(first, min(first + LONGEST_SEGMENT, layers.stop))
            weights = [self.segment_layers[layer - 1] for layer in part]
            pasts = [self._past(layer, cache) for layer in part]
            torch._dynamo.mark_static(states, 0)
            segment = compiled_segment(self.prepared, self.options, self.model, len(part), len(states))
            states, previous, keys_values = segment(states, weights, pasts, self.present)
            cache.write_layers(part, rows, keys_values[:, :, : len(rows)])
        return states[: len(rows), None], previous[: len(rows), None]

    def begin_step(self, rows: Rows, cache: EarlyExitCache, length: int) -> None:
        super().begin_step(rows, cache, length)
        self.present_rows = None

    @cached_property
    def segment_layers(self) -> list[SegmentLayer]:
        return [segment_layer(block) for block in self.blocks]

    def _present(self, rows: Rows, cache: EarlyExitCache) -> Present:
        """The inputs that all layers of this step share for these rows."""
        self._follow(rows)
        size = bucket(len(rows))
        index = filled_up(rows.index, size)
        positions = filled_up(to_device([cache.lengths[row] for row in rows], cache.device), size)
        bias = self.row_self_bias[:, :, 0]
        later = cache.capacity - bias.shape[-1]
        bias = pad(bias, (0, later), value=torch.finfo(bias.dtype).min)
        bias = bias if bias.shape[0] == 1 else filled_up(bias, size)
        # Always given, for every row, so that a padded source needs no other graphs.
        cross_bias = filled_up(self.row_cross_mask[:, :, 0].expand(len(rows), -1, -1), size).clone(
            memory_format=torch.contiguous_format
        )
        return Present(index, positions, of_any_size(bias, -1), of_any_size(cross_bias, -1))

    def _past(self, layer: int, cache: EarlyExitCache) -> Past:
        """Keys and values that a layer attends to; memoised, since they are the same tensors at every step."""
        keys = cache.keys
        if self.pasts_of is not keys:
            self.pasts_of, self.pasts = keys, {}
        if layer not in self.pasts:
            arena = (cache.keys[layer - 1], cache.values[layer - 1])
            parts = (*arena, cache.cross_keys[layer - 1], cache.cross_values[layer - 1])
            self.pasts[layer] = Past(*(of_any_size(part, 0, 2) for part in parts))
        return self.pasts[layer]

    pasts_of: torch.Tensor | None = None

    def warm_up(self, segments: Iterable[range], cache: EarlyExitCache) -> Iterator[None]:
        """Compile graphs for segments of these lengths and any number of rows in the batch; yields after each one."""
        batch, width = cache.num_rows, cache.encoder_states.shape[-1]
        sizes = {bucket(rows): rows for rows in range(self.most_rows, 0, -1)}
        for rows in (Rows(range(count), batch, cache.device) for count in sizes.values()):
            self.begin_step(rows, cache, 1)
            for segment in {len(segment): segment for segment in segments}.values():
                hidden = cache.encoder_states.new_zeros(len(rows), 1, width)
                self.run_blocks(segment, hidden, rows, cache)
                yield


def most_rows(cache: EarlyExitCache) -> int:
    """The largest number of rows that compiled segments are used for."""
    return 1 if cache.device.type == "cpu" else cache.num_rows


def bucket(rows: int) -> int:
    """The number of rows that a graph runs with: the next power of two."""
    return 1 << (rows - 1).bit_length()


def of_any_size(tensor: torch.Tensor, *dimensions: int) -> torch.Tensor:
    """The tensor, marked dynamic in these dimensions; sizes 0 and 1 have graphs of their own."""
    for dimension in {dimension % tensor.dim() for dimension in dimensions}:
        if tensor.shape[dimension] > 1:
            torch._dynamo.mark_dynamic(tensor, dimension)
    return tensor


def filled_up(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """The tensor with its last row repeated up to `size` rows; results of the repeated rows are discarded."""
    missing = size - len(tensor)
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) if missing else tensor


def segment_layer(block: nn.Module) -> SegmentLayer:
    """The weights of a layer in the form that a segment takes."""
    attention, cross, feed = block.layer[0].SelfAttention, block.layer[1].EncDecAttention, block.layer[2]
    dense = feed.DenseReluDense
    return SegmentLayer(
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
    """The model's own weights of linear maps of the same input, detached."""
    return tuple(one.weight.detach() for one in maps)


def compiled_segment(
    prepared: PreparedT5, options: CompileOptions, model: nn.Module, layers: int, rows: int
) -> Callable:
    """The segment function for this number of layers and rows, compiled once per prepared copy and options."""
    key = (options, layers, rows)
    if key not in prepared.compiled:
        config = model.config
        activation = prepared.layers[0].activation
        segment = Segment(activation, config.is_gated_act, config.layer_norm_epsilon, config.num_heads)
        prepared.compiled[key] = options.compile(segment)
    return prepared.compiled[key]
