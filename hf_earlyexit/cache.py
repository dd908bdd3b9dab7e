"""Answers for what later tokens see in the layers that an earlier token skipped.

A token that leaves after layer e parks its hidden state here. What it owes the layers above e, its keys and values,
is a debt: it is paid when a later token of the same row comes to such a layer, all owed positions in one projection,
or never. Nobody else writes keys or values. The cache never sees a criterion and knows no model: it is handed the
projections of a layer when a debt is due.

Because a token runs a prefix of the layers and a row catches up before it goes deeper, one integer per layer and row
is the whole bookkeeping: `filled[layer - 1][row]` leading positions are complete. It never grows with depth, and what
a layer lacks of a row is one contiguous range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from transformers import Cache

from hf_earlyexit.rows import Rows
from hf_earlyexit.transfer import to_device, to_host


CATCH_UPS = ("project",)
FILLS = ("lazy", "eager")
FRONT = 64

Projection = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class EarlyExitCache(Cache):
    """Keys, values and parked states of a batch whose rows leave the decoder at different layers.

    Layers are counted from 1, as everywhere in this package: `layer` is how many layers have run after it.
    All tensors are parts of one arena per kind, preallocated, doubled when full and handed out as views.

    Args:
        num_layers: Decoder layers.
        batch_size: Rows.
        num_heads: Key/value heads.
        head_dim: Width of a head.
        dtype: Of keys and values. Parked states keep the dtype of the residual stream, which is fp32 in an fp16 T5.
        device: Where everything lies.
        capacity: Positions to make room for at first.
        fill: `"lazy"` pays a debt when a token comes to the layer; `"eager"` pays all before the step ends, as in
            arXiv 2407.20272.
        catch_up: How debts are paid. `"project"`: the skipped layer's own norm and K/V projections of the parked
            state (CALM, arXiv 2207.07061, section 3). Fixed when the cache is made.
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
        catch_up: str = "project",
    ):
        super().__init__(layers=[])
        if fill not in FILLS:
            raise ValueError(f"`fill` must be one of {FILLS}, got {fill!r}.")
        if catch_up not in CATCH_UPS:
            raise ValueError(f"`catch_up` must be one of {CATCH_UPS}, got {catch_up!r}.")
        self.num_layers, self.num_rows = num_layers, batch_size
        self.num_heads, self.head_dim = num_heads, head_dim
        self.dtype, self.device = dtype, torch.device(device)
        self.fill, self.catch_up_mode = fill, catch_up
        self._hold(self._new_arena(capacity))
        self.device = self.keys.device  # with its number, where a device has one
        self.parked: torch.Tensor | None = None
        self.encoder_states: torch.Tensor | None = None
        self.prompts = list(range(batch_size))
        self.reset()

    # --- one step: catch up, write, park, advance -------------------------------------------------------------------

    def lacks(self, layer: int, rows: Rows) -> bool:
        """Whether `layer` has not all positions of `rows`."""
        filled = self.filled[layer - 1]
        return any(filled[row] < self.lengths[row] for row in rows)

    def catch_up(self, layer: int, rows: Rows, project: Projection) -> int:
        """Pay what `rows` owe `layer`; returns how many positions were filled.

        Args:
            project: `(layer, states [positions, hidden]) -> keys, values [positions, heads, head]`.
        """
        filled = self.filled[layer - 1]
        debts = [(row, filled[row], self.lengths[row]) for row in rows if filled[row] < self.lengths[row]]
        if not debts:
            return 0
        if len(debts) == 1:
            row, start, stop = debts[0]
            keys, values = project(layer, self.parked[row, start:stop])
            self.keys[layer - 1, row, :, start:stop] = keys.transpose(0, 1)  # casts where autocast has made it half
            self.values[layer - 1, row, :, start:stop] = values.transpose(0, 1)
        else:
            self._pay(layer, debts, project)
        for row, _, stop in debts:
            filled[row] = stop
        return sum(stop - start for _, start, stop in debts)

    def _pay(self, layer: int, debts: list[tuple[int, int, int]], project: Projection) -> None:
        """Fill the owed positions of several rows in one projection."""
        owed_rows = [row for row, start, stop in debts for _ in range(start, stop)]
        owed_positions = [position for _, start, stop in debts for position in range(start, stop)]
        row, position = to_device([owed_rows, owed_positions], self.device).unbind()
        keys, values = project(layer, self.parked[row, position])
        self.keys[layer - 1][row, :, position] = keys.to(self.dtype)
        self.values[layer - 1][row, :, position] = values.to(self.dtype)

    def write(self, layer: int, rows: Rows, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the current tokens' keys and values, `[rows, heads, length, head]`, behind what each row holds."""
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
        """Store the current tokens' keys and values `[2, layers, rows, heads, head]` of neighbouring layers."""
        first, last, start = layers[0] - 1, layers[-1], self._common_length(rows)
        if start is not None and len(rows.runs) == 1:
            self.arena[:, first:last, rows.runs[0], :, start] = keys_values
        else:
            positions = to_device([self.lengths[row] for row in rows], self.device)
            by_row = self.arena[:, first:last].permute(2, 4, 0, 1, 3, 5)
            by_row[rows.index, positions] = keys_values.permute(2, 0, 1, 3, 4).to(self.dtype)
        self.mark_written(layers, rows)

    def mark_written(self, layers: range, rows: Rows) -> None:
        """Note that the current tokens' keys and values of neighbouring layers are in the arena."""
        for filled in self.filled[layers[0] - 1 : layers[-1]]:
            for row in rows:
                filled[row] = self.lengths[row] + 1

    def adopt(self, arena: torch.Tensor) -> None:
        """Lie in `arena [2, layers, rows, heads, capacity, head]` from now on; every position is forgotten.

        Raises:
            ValueError: It has another shape or dtype than this cache needs.
        """
        shape = (2, self.num_layers, self.num_rows, self.num_heads, arena.shape[4], self.head_dim)
        if arena.shape != shape or arena.dtype != self.dtype:
            found = f"{arena.dtype} of shape {list(arena.shape)}"
            raise ValueError(f"`arena` must be {self.dtype} of shape {list(shape)}, got {found}.")
        self._hold(arena)
        self.parked = None
        self.lengths = [0] * self.num_rows
        self.filled = [[0] * self.num_rows for _ in range(self.num_layers)]

    def view(self, layer: int, rows: Rows, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `length` positions, as views: of `rows` where these are neighbours, else of
        the whole batch, for an attention function that knows the live rows."""
        which = rows.runs[0] if len(rows.runs) == 1 else slice(None)
        return self.keys[layer - 1, which, :, :length], self.values[layer - 1, which, :, :length]

    def park(self, rows: Rows, hidden: torch.Tensor) -> None:
        """Keep `hidden [rows, hidden]`, the states with which `rows` leave, at their current positions."""
        if self.parked is None:
            shape = (self.num_rows, self.capacity, hidden.shape[-1])
            self.parked = torch.empty(shape, dtype=hidden.dtype, device=self.device)
        if (position := self._common_length(rows)) is not None:
            rows.place(self.parked[:, position], hidden)
        else:
            positions = to_device([self.lengths[row] for row in rows], self.device)
            self.parked[rows.index, positions] = hidden

    def advance(self, rows: Rows, length: int = 1) -> None:
        """`rows` are done with `length` more positions, each at the depth it went to."""
        for row in rows:
            self.lengths[row] += length

    def reserve(self, rows: Rows, length: int = 1) -> None:
        """Make room for `length` more positions of `rows`."""
        needed = max(self.lengths[row] for row in rows) + length
        if needed <= self.capacity:
            return
        capacity = max(needed, 2 * self.capacity)
        used = max(self.lengths)
        arena, parked = self.arena, self.parked
        self._hold(self._new_arena(capacity))
        self.arena[..., :used, :] = arena[..., :used, :]
        if parked is not None:
            self.parked = parked.new_empty((self.num_rows, capacity, parked.shape[-1]))
            self.parked[:, :used] = parked[:, :used]

    # --- cross-attention --------------------------------------------------------------------------------------------

    def attach_encoder(self, states: torch.Tensor, rows_per_prompt: int = 1) -> None:
        """Take the encoder states `[batch, source, hidden]` that cross-attention keys and values are projected from.

        Args:
            rows_per_prompt: Neighbouring rows that share a prompt (beams, returned sequences): their states are equal.
        """
        self.encoder_states = states
        self.prompts = [row // rows_per_prompt for row in range(self.num_rows)]
        self.cross_keys: list[torch.Tensor | None] = [None] * self.num_layers
        self.cross_values: list[torch.Tensor | None] = [None] * self.num_layers
        self.cross_filled = [[False] * self.num_rows for _ in range(self.num_layers)]

    def fill_cross(self, layer: int, rows: Rows, project: Projection) -> None:
        """Project the encoder states for those of `rows` that come to `layer` for the first time.

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
            newcomers.place(held, new.to(held.dtype))  # which autocast may have made half
        for row in newcomers:
            filled[row] = True

    def cross_view(self, layer: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-attention keys and values, as views in the manner of `view`."""
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
        """Remove the last positions; debts that lay there are gone with them. Cross-attention is untouched.

        Args:
            tokens_to_remove: Minus the number of positions, for all rows or one number per row. Zero or negative, as
                in the library's caches.
        """
        removals = [tokens_to_remove] * self.num_rows if isinstance(tokens_to_remove, int) else tokens_to_remove
        if len(removals) != self.num_rows:
            raise ValueError(f"`tokens_to_remove` has {len(removals)} entries for {self.num_rows} rows.")
        if any(removal > 0 for removal in removals):
            raise ValueError(f"`tokens_to_remove` must be zero or negative, got {tokens_to_remove}.")
        self.lengths = [max(0, length + removal) for length, removal in zip(self.lengths, removals, strict=True)]
        self.filled = [[min(*pair) for pair in zip(layer, self.lengths, strict=True)] for layer in self.filled]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `b` becomes what row `beam_idx[b]` was.

        Cross-attention stays where it is while every row stays inside its prompt, since it is equal there.
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
        if self.parked is not None:
            used = max(self.lengths)
            self.parked[to, :used] = self.parked[source, :used]
        self._take_bookkeeping(sources, cross=False)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order; a row may be named more than once, or not at all."""
        sources = to_host(indices)
        index = indices.to(self.device)
        self.num_rows = len(sources)
        arena, old = self._new_arena(self.capacity), self.arena
        self._hold(arena.copy_(old.index_select(2, index)))
        select = lambda tensor: None if tensor is None else tensor.index_select(0, index)  # noqa: E731
        self.parked, self.encoder_states = select(self.parked), select(self.encoder_states)
        self.cross_keys = [select(keys) for keys in self.cross_keys]
        self.cross_values = [select(values) for values in self.cross_values]
        self._take_bookkeeping(sources, cross=True)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies next to each other."""
        self.batch_select_indices(torch.arange(self.num_rows).repeat_interleave(repeats))

    def _take_bookkeeping(self, sources: list[int], cross: bool) -> None:
        self.num_rows = len(sources)
        self.lengths = [self.lengths[source] for source in sources]
        self.filled = [[layer[source] for source in sources] for layer in self.filled]
        if cross:
            self.prompts = [self.prompts[source] for source in sources]
            self.cross_filled = [[layer[source] for source in sources] for layer in self.cross_filled]

    # --- what the library asks of a cache ---------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.num_layers

    def __repr__(self) -> str:
        return f"EarlyExitCache({self.num_layers} layers, lengths {self.lengths}, {self.fill}, {self.catch_up_mode})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The logical length of the longest row: positions filled and owed, the same at every layer."""
        return max(self.lengths, default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the arena grows."""
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
        """Positions there is room for."""
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes allocated: keys, values, parked states, cross-attention keys and values."""
        tensors = [self.arena, self.parked, *self.cross_keys, *self.cross_values]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def _hold(self, arena: torch.Tensor) -> None:
        """Take `arena [2, layers, batch, heads, capacity, head]`; `keys` and `values` are views of it."""
        self.arena = arena
        self.keys, self.values = arena.unbind()

    def _new_arena(self, capacity: int) -> torch.Tensor:
        shape = (2, self.num_layers, self.num_rows, self.num_heads, capacity, self.head_dim)
        # Zeros, since a shorter row's unwritten positions are masked out, and what is masked must be finite. Some in
        # front, since a graph compiled for a tensor that starts in the middle of its memory does not take one that
        # starts at 0, and the layers are to share graphs.
        zeros = torch.zeros(FRONT + math.prod(shape), dtype=self.dtype, device=self.device)
        return zeros[FRONT:].view(shape)

    def _common_length(self, rows: Rows) -> int | None:
        """The length that all of `rows` have, or None where they differ."""
        lengths = {self.lengths[row] for row in rows}
        return lengths.pop() if len(lengths) == 1 else None
