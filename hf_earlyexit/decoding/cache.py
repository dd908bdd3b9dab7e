"""The KV cache of early-exit decoding, with backfill of keys and values that exited tokens skipped.

A token that exits after layer e has no keys and values in the layers above e. The cache keeps its hidden state
instead. When a later token of the same row reaches such a layer, all missing positions of the row are projected at
once; if none does, they are never computed. Only this class writes keys and values. Independent of criteria and
models: the projections of a layer are passed in.

A token runs a prefix of the layers, and a row is backfilled before it goes deeper. So one integer per layer and row
is the whole bookkeeping: the first `filled[layer - 1][row]` positions are complete. The number never grows with depth,
and the positions missing at a layer are one contiguous range per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from transformers import Cache

from hf_earlyexit.common.transfer import to_device, to_host
from hf_earlyexit.kernels.rows import Rows


FILLINGS = ("project",)
FILLS = ("lazy", "eager")
FRONT = 64

Projection = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class EarlyExitCache(Cache):
    """Keys, values and kept hidden states of a batch whose rows exit at different layers.

    Layers are counted from 1, as everywhere in this package: after `layer`, that many layers have run.
    Each kind of tensor lies in one arena. Arenas are preallocated, doubled when full, and read as views.

    Args:
        num_layers: Number of decoder layers.
        batch_size: Number of rows.
        num_heads: Number of key/value heads.
        head_dim: Width of a head.
        dtype: Dtype of keys and values. Kept states have the dtype of the residual stream, which is fp32 in an fp16
            T5.
        device: Device of all tensors.
        capacity: Initial number of positions.
        fill: `"lazy"` backfills a layer when a token reaches it; `"eager"` fills all layers before the step ends, as
            in arXiv 2407.20272.
        filling: How missing keys and values are computed. `"project"`: the skipped layer's own norm and K/V
            projections, applied to the kept state (CALM, arXiv 2207.07061, section 3). Fixed when the cache is made.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int = 64,
        fill: str = "lazy",
        filling: str = "project",
    ):
        super().__init__(layers=[])
        if fill not in FILLS:
            raise ValueError(f"`fill` must be one of {FILLS}, got {fill!r}.")
        if filling not in FILLINGS:
            raise ValueError(f"`filling` must be one of {FILLINGS}, got {filling!r}.")
        self.num_layers, self.num_rows = num_layers, batch_size
        self.num_heads, self.head_dim = num_heads, head_dim
        self.dtype, self.device = dtype, torch.device(device)
        self.fill, self.filling = fill, filling
        self._hold(self._new_arena(capacity))
        self.device = self.keys.device  # includes the device index, if there is one
        self.kept: torch.Tensor | None = None
        self.encoder_states: torch.Tensor | None = None
        self.prompts = list(range(batch_size))
        self.reset()

    # --- one step: backfill, write, keep, advance -------------------------------------------------------------------

    def lacks(self, layer: int, rows: Rows) -> bool:
        """Whether positions of `rows` are missing at `layer`."""
        filled = self.filled[layer - 1]
        return any(filled[row] < self.lengths[row] for row in rows)

    def backfill(self, layer: int, rows: Rows, project: Projection) -> int:
        """Fill the missing keys and values of `rows` at `layer`; returns how many positions were filled.

        Args:
            project: `(layer, states [positions, hidden]) -> keys, values [positions, heads, head]`.
        """
        filled = self.filled[layer - 1]
        missing = [(row, filled[row], self.lengths[row]) for row in rows if filled[row] < self.lengths[row]]
        if not missing:
            return 0
        if len(missing) == 1:
            row, start, stop = missing[0]
            keys, values = project(layer, self.kept[row, start:stop])
            self.keys[layer - 1, row, :, start:stop] = keys.transpose(0, 1)  # casts half-precision results of autocast
            self.values[layer - 1, row, :, start:stop] = values.transpose(0, 1)
        else:
            self._project_missing(layer, missing, project)
        for row, _, stop in missing:
            filled[row] = stop
        return sum(stop - start for _, start, stop in missing)

    def _project_missing(self, layer: int, missing: list[tuple[int, int, int]], project: Projection) -> None:
        """Fill the missing positions of several rows with one projection."""
        missing_rows = [row for row, start, stop in missing for _ in range(start, stop)]
        missing_positions = [position for _, start, stop in missing for position in range(start, stop)]
        row, position = to_device([missing_rows, missing_positions], self.device).unbind()
        keys, values = project(layer, self.kept[row, position])
        self.keys[layer - 1][row, :, position] = keys.to(self.dtype)
        self.values[layer - 1][row, :, position] = values.to(self.dtype)

    def write(self, layer: int, rows: Rows, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the current tokens' keys and values, `[rows, heads, length, head]`, after each row's last position."""
        length = keys.shape[2]
        keys, values = keys.to(self.dtype), values.to(self.dtype)
        start = self._common_length(rows)
        for arena, new in ((self.keys[layer - 1], keys), (self.values[layer - 1], values)):
            if start is not None:
                rows.place(arena[:, :, start : start + length], new)
            else:
                for place, row in enumerate(rows):
                    own = self.lengths[row]
                    arena[row, :, own : own + length] = new[place]
        filled = self.filled[layer - 1]
        for row in rows:
            filled[row] = self.lengths[row] + length

    def write_layers(self, layers: range, rows: Rows, keys_values: torch.Tensor) -> None:
        """Store the current tokens' keys and values `[2, layers, rows, heads, head]` of consecutive layers."""
        first, last, start = layers[0] - 1, layers[-1], self._common_length(rows)
        if start is not None and len(rows.runs) == 1:
            self.arena[:, first:last, rows.runs[0], :, start] = keys_values
        else:
            positions = to_device([self.lengths[row] for row in rows], self.device)
            by_row = self.arena[:, first:last].permute(2, 4, 0, 1, 3, 5)
            by_row[rows.index, positions] = keys_values.permute(2, 0, 1, 3, 4).to(self.dtype)
        self.mark_written(layers, rows)

    def mark_written(self, layers: range, rows: Rows) -> None:
        """Mark the current tokens' keys and values of consecutive layers as present in the arena."""
        for filled in self.filled[layers[0] - 1 : layers[-1]]:
            for row in rows:
                filled[row] = self.lengths[row] + 1

    def adopt(self, arena: torch.Tensor) -> None:
        """Use `arena [2, layers, rows, heads, capacity, head]` from now on, and forget all positions.

        Raises:
            ValueError: `arena` has the wrong shape or dtype for this cache.
        """
        shape = (2, self.num_layers, self.num_rows, self.num_heads, arena.shape[4], self.head_dim)
        if arena.shape != shape or arena.dtype != self.dtype:
            found = f"{arena.dtype} of shape {list(arena.shape)}"
            raise ValueError(f"`arena` must be {self.dtype} of shape {list(shape)}, got {found}.")
        self._hold(arena)
        self.kept = None
        self.lengths = [0] * self.num_rows
        self.filled = [[0] * self.num_rows for _ in range(self.num_layers)]

    def view(self, layer: int, rows: Rows, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the keys and values of the first `length` positions.

        They cover `rows` if these are adjacent, else the whole batch; the attention function then selects the live
        rows.
        """
        which = rows.runs[0] if len(rows.runs) == 1 else slice(None)
        return self.keys[layer - 1, which, :, :length], self.values[layer - 1, which, :, :length]

    def keep(self, rows: Rows, hidden: torch.Tensor) -> None:
        """Keep `hidden [rows, hidden]`, the states with which `rows` exit, at their current positions."""
        if self.kept is None:
            shape = (self.num_rows, self.capacity, hidden.shape[-1])
            self.kept = torch.empty(shape, dtype=hidden.dtype, device=self.device)
        if (position := self._common_length(rows)) is not None:
            rows.place(self.kept[:, position], hidden)
        else:
            positions = to_device([self.lengths[row] for row in rows], self.device)
            self.kept[rows.index, positions] = hidden

    def advance(self, rows: Rows, length: int = 1) -> None:
        """Add `length` finished positions to `rows`, at whatever depth each exited."""
        for row in rows:
            self.lengths[row] += length

    def reserve(self, rows: Rows, length: int = 1) -> None:
        """Make room for `length` more positions of `rows`."""
        needed = max(self.lengths[row] for row in rows) + length
        if needed <= self.capacity:
            return
        capacity = max(needed, 2 * self.capacity)
        used = max(self.lengths)
        arena, kept = self.arena, self.kept
        self._hold(self._new_arena(capacity))
        self.arena[..., :used, :] = arena[..., :used, :]
        if kept is not None:
            self.kept = kept.new_empty((self.num_rows, capacity, kept.shape[-1]))
            self.kept[:, :used] = kept[:, :used]

    # --- cross-attention --------------------------------------------------------------------------------------------

    def attach_encoder(self, states: torch.Tensor, rows_per_prompt: int = 1) -> None:
        """Set the encoder states `[batch, source, hidden]` that cross-attention keys and values are projected from.

        Args:
            rows_per_prompt: Number of adjacent rows that share a prompt (beams, returned sequences). Their states are
                equal.
        """
        self.encoder_states = states
        self.prompts = [row // rows_per_prompt for row in range(self.num_rows)]
        self.cross_keys: list[torch.Tensor | None] = [None] * self.num_layers
        self.cross_values: list[torch.Tensor | None] = [None] * self.num_layers
        self.cross_filled = [[False] * self.num_rows for _ in range(self.num_layers)]

    def fill_cross(self, layer: int, rows: Rows, project: Projection) -> None:
        """Project the encoder states for those of `rows` that reach `layer` for the first time.

        Args:
            project: `(layer, states [rows, source, hidden]) -> keys, values [rows, heads, source, head]`.
        """
        filled = self.cross_filled[layer - 1]
        missing = [place for place, row in enumerate(rows) if not filled[row]]
        if not missing:
            return
        newcomers = rows if len(missing) == len(rows) else rows.choose(missing)
        keys, values = project(layer, newcomers.select(self.encoder_states))
        if self.cross_keys[layer - 1] is None:
            shape = (self.num_rows, *keys.shape[1:])
            self.cross_keys[layer - 1], self.cross_values[layer - 1] = keys.new_empty(shape), values.new_empty(shape)
        for held, new in ((self.cross_keys[layer - 1], keys), (self.cross_values[layer - 1], values)):
            newcomers.place(held, new.to(held.dtype))  # casts half-precision results of autocast
        for row in newcomers:
            filled[row] = True

    def cross_view(self, layer: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the cross-attention keys and values, with rows as in `view`."""
        which = rows.runs[0] if len(rows.runs) == 1 else slice(None)
        return self.cross_keys[layer - 1][which], self.cross_values[layer - 1][which]

    # --- the batch changes ------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget every position and the encoder; the arena stays."""
        self.lengths = [0] * self.num_rows
        self.filled = [[0] * self.num_rows for _ in range(self.num_layers)]
        self.encoder_states = None
        self.cross_keys, self.cross_values = [None] * self.num_layers, [None] * self.num_layers
        self.cross_filled = [[False] * self.num_rows for _ in range(self.num_layers)]

    def crop(self, tokens_to_remove: int | Sequence[int]) -> None:
        """Remove the last positions, filled or missing. Cross-attention is unchanged.

        Args:
            tokens_to_remove: The negated number of positions, for all rows or one number per row. Zero or negative,
                as in the library's caches.
        """
        removals = [tokens_to_remove] * self.num_rows if isinstance(tokens_to_remove, int) else tokens_to_remove
        if len(removals) != self.num_rows:
            raise ValueError(f"`tokens_to_remove` has {len(removals)} entries for {self.num_rows} rows.")
        if any(removal > 0 for removal in removals):
            raise ValueError(f"`tokens_to_remove` must be zero or negative, got {tokens_to_remove}.")
        self.lengths = [max(0, length + removal) for length, removal in zip(self.lengths, removals, strict=True)]
        self.filled = [[min(*pair) for pair in zip(layer, self.lengths, strict=True)] for layer in self.filled]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace the content of row `b` by that of row `beam_idx[b]`.

        Cross-attention is not moved if every row stays within its prompt, since rows of a prompt are equal there.
        """
        sources = to_host(beam_idx)
        moved = [row for row, source in enumerate(sources) if row != source]
        if not moved:
            return
        if any(self.prompts[row] != self.prompts[sources[row]] for row in moved):
            return self.batch_select_indices(beam_idx)
        to = to_device(moved, self.device)
        source = to_device([sources[row] for row in moved], self.device)
        for layer, filled in enumerate(self.filled):
            if used := max(filled):
                self.arena[:, layer, to, :, :used] = self.arena[:, layer, source, :, :used]
        if self.kept is not None:
            used = max(self.lengths)
            self.kept[to, :used] = self.kept[source, :used]
        self._take_bookkeeping(sources, cross=False)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select the rows `indices`, in that order; a row may occur more than once, or not at all."""
        sources = to_host(indices)
        index = indices.to(self.device)
        self.num_rows = len(sources)
        arena, old = self._new_arena(self.capacity), self.arena
        self._hold(arena.copy_(old.index_select(2, index)))
        select = lambda tensor: None if tensor is None else tensor.index_select(0, index)  # noqa: E731
        self.kept, self.encoder_states = select(self.kept), select(self.encoder_states)
        self.cross_keys = [select(keys) for keys in self.cross_keys]
        self.cross_values = [select(values) for values in self.cross_values]
        self._take_bookkeeping(sources, cross=True)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, with copies adjacent."""
        self.batch_select_indices(torch.arange(self.num_rows).repeat_interleave(repeats))

    def _take_bookkeeping(self, sources: list[int], cross: bool) -> None:
        self.num_rows = len(sources)
        self.lengths = [self.lengths[source] for source in sources]
        self.filled = [[layer[source] for source in sources] for layer in self.filled]
        if cross:
            self.prompts = [self.prompts[source] for source in sources]
            self.cross_filled = [[layer[source] for source in sources] for layer in self.cross_filled]

    # --- the library's cache interface ------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.num_layers

    def __repr__(self) -> str:
        return f"EarlyExitCache({self.num_layers} layers, lengths {self.lengths}, {self.fill}, {self.filling})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The logical length of the longest row: filled and missing positions, the same at every layer."""
        return max(self.lengths, default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1, meaning no limit, since the arena grows."""
        return -1

    def update(self, *args, **kwargs):
        raise NotImplementedError("`EarlyExitCache` is written by its own walk; use it through `model.generate(...)`.")

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self.num_layers

    @property
    def is_linear(self) -> list[bool]:
        return [False] * self.num_layers

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * self.num_layers

    @property
    def batch_size(self) -> int:
        return self.num_rows

    def activate_past_recording(self) -> None:
        """Nothing to do: any position can be cropped."""

    # --- the arena --------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Number of positions the arena has room for."""
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys, values, kept states, and cross-attention keys and values."""
        tensors = [self.arena, self.kept, *self.cross_keys, *self.cross_values]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def _hold(self, arena: torch.Tensor) -> None:
        """Set `arena [2, layers, batch, heads, capacity, head]`; `keys` and `values` are views of it."""
        self.arena = arena
        self.keys, self.values = arena.unbind()

    def _new_arena(self, capacity: int) -> torch.Tensor:
        shape = (2, self.num_layers, self.num_rows, self.num_heads, capacity, self.head_dim)
        # Zeros, since unwritten positions of shorter rows are masked out, and masked values must be finite. The first
        # layer's tensor must not start at memory offset 0: a graph compiled for a tensor with a nonzero offset does
        # not accept one with offset 0, and all layers share graphs. Hence the `FRONT` unused entries.
        zeros = torch.zeros(FRONT + math.prod(shape), dtype=self.dtype, device=self.device)
        return zeros[FRONT:].view(shape)

    def _common_length(self, rows: Rows) -> int | None:
        """The common length of `rows`, or None if their lengths differ."""
        lengths = {self.lengths[row] for row in rows}
        return lengths.pop() if len(lengths) == 1 else None
