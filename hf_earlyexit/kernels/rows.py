"""Sets of batch rows: as host integers, as an index tensor, and as runs of adjacent rows.

Row sets are immutable; derived values are computed once. Independent of models, caches and criteria.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch

from hf_earlyexit.common.transfer import to_device


LARGE_ROW = 16_384


class Rows:
    """Some rows of a batch, in ascending order.

    Args:
        indices: The rows, ascending, each in `0 .. batch_size - 1`.
        batch_size: Number of rows of the whole batch.
        device: Device of index tensors.
    """

    def __init__(self, indices: Sequence[int], batch_size: int, device: torch.device | str = "cpu"):
        self.indices = list(indices)
        self.batch_size = batch_size
        self.device = device

    @classmethod
    def everyone(cls, batch_size: int, device: torch.device | str = "cpu") -> Rows:
        return cls(range(batch_size), batch_size, device)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __repr__(self) -> str:
        return f"Rows({self.indices} of {self.batch_size})"

    @property
    def is_everyone(self) -> bool:
        return len(self.indices) == self.batch_size

    @cached_property
    def index(self) -> torch.Tensor:
        """The rows as a `LongTensor [rows]`."""
        return to_device(self.indices, self.device)

    @cached_property
    def runs(self) -> list[slice]:
        """The rows as the fewest slices of adjacent rows; each can be read from a batch tensor as a view."""
        runs: list[slice] = []
        for row in self.indices:
            if runs and runs[-1].stop == row:
                runs[-1] = slice(runs[-1].start, row + 1)
            else:
                runs.append(slice(row, row + 1))
        return runs

    @cached_property
    def places(self) -> list[slice]:
        """The slice of each of `runs` in a tensor `[rows, ...]` of these rows."""
        places, start = [], 0
        for run in self.runs:
            places.append(slice(start, start + run.stop - run.start))
            start = places[-1].stop
        return places

    def choose(self, places: Sequence[int]) -> Rows:
        """The subset of rows at these indices of this set."""
        return Rows([self.indices[place] for place in places], self.batch_size, self.device)

    def select(self, tensor: torch.Tensor) -> torch.Tensor:
        """These rows of a batch tensor `[batch, ...]`, as a view if they are adjacent."""
        if self.is_everyone:
            return tensor
        if len(self.runs) == 1:
            return tensor[self.runs[0]]
        return tensor.index_select(0, self.index)

    def place(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Write `values [rows, ...]` into these rows of a batch tensor, in place."""
        # Slices copy large rows twice as fast as an index does; an index copies several small ones in one call.
        if len(self.runs) == 1 or values[0].numel() >= LARGE_ROW:
            for run, here in zip(self.runs, self.places, strict=True):
                tensor[run] = values[here]
        else:
            tensor.index_copy_(0, self.index, values)
