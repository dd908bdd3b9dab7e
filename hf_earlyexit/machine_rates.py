"""Answers for what this machine can do at best: how fast it reads memory, how fast it multiplies few rows.

Measured by what torch does here, at the thread count in force. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch

from hf_earlyexit.stopwatch import clock_on


LARGE = 256 * 2**20  # bytes that no cache holds
SMALL = 2**19  # bytes of weights that stay in the nearest large cache
PRODUCT_ROWS = (1, 4, 8, 64)
INNER_WIDTHS = (256, 512)  # of the products; the better one counts
BEST_OF = 4


@dataclass(frozen=True)
class MachineRates:
    """Rates of a machine.

    Attributes:
        bandwidth: Bytes per second read from memory.
        working_set: Bytes that the decoder reads per step.
        working_bandwidth: Bytes per second where that many are read over and over; more than `bandwidth` where they
            stay in a cache.
        product_rows: Rows of the products measured, ascending.
        cached_rates: FLOPs per second of products of so many rows with weights that stay in a cache.
        memory_rates: The same with weights that come from memory.
        threads: Of torch.
    """

    bandwidth: float
    working_set: int
    working_bandwidth: float
    product_rows: tuple[int, ...]
    cached_rates: tuple[float, ...]
    memory_rates: tuple[float, ...]
    threads: int

    @classmethod
    def measure(cls, working_set: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> MachineRates:
        """Measure here and now; a few seconds.

        Args:
            working_set: Bytes that the decoder reads per step.
            dtype: Of the weights.
            device: Where they are.
        """
        bandwidth = read_bandwidth(LARGE, device)
        working = bandwidth if working_set >= LARGE else max(bandwidth, read_bandwidth(working_set, device))
        cached = [product_rate(rows, SMALL, dtype, device) for rows in PRODUCT_ROWS]
        memory = [product_rate(rows, LARGE, dtype, device) for rows in PRODUCT_ROWS]
        threads = torch.get_num_threads()
        return cls(bandwidth, working_set, working, PRODUCT_ROWS, tuple(cached), tuple(memory), threads)

    def rate_at(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """FLOPs per second at so many rows, weights in a cache; between those measured on a line, beyond as there."""
        return np.interp(rows, self.product_rows, self.cached_rates)


def read_bandwidth(size: int, device: Any) -> float:
    """Bytes per second of summing a tensor of `size` bytes again and again."""
    numbers = torch.ones(max(1, size // 4), device=device)
    times = max(1, LARGE // 4 // numbers.nbytes)
    return times * numbers.nbytes / best_seconds(lambda: [numbers.sum() for _ in range(times)], device)


@torch.no_grad()
def product_rate(rows: int, size: int, dtype: torch.dtype, device: Any) -> float:
    """FLOPs per second of `[rows, inner]` times matrices that are `size` bytes together, one after the other."""
    return max(_product_rate(rows, inner, size, dtype, device) for inner in INNER_WIDTHS)


def _product_rate(rows: int, inner: int, size: int, dtype: torch.dtype, device: Any) -> float:
    hidden = torch.ones(rows, inner, dtype=dtype, device=device)
    outer = SMALL // hidden.element_size() // inner
    weights = torch.ones(max(1, size // SMALL), outer, inner, dtype=dtype, device=device).unbind()
    times = max(len(weights), 64)
    turns = [weight for _, weight in zip(range(times), cycle(weights))]
    product = torch.nn.functional.linear
    return times * 2 * rows * outer * inner / best_seconds(lambda: [product(hidden, one) for one in turns], device)


def best_seconds(call: Callable[[], Any], device: Any) -> float:
    """The shortest of some calls, after one to warm up."""
    read = clock_on(device)
    call()
    found = []
    for _ in range(BEST_OF):
        start = read()
        call()
        found.append(read() - start)
    return max(min(found), 1e-9)
