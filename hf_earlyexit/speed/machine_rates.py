"""Limits of this machine: memory bandwidth, and the speed of matrix products with few rows.

Measured with torch operations, at the current thread count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch

from hf_earlyexit.speed.timing import clock_on


LARGE = 256 * 2**20  # bytes; too many for any cache
SMALL = 2**19  # bytes of weights that stay in the nearest large cache
PRODUCT_ROWS = (1, 4, 8, 64)
INNER_WIDTHS = (256, 512)  # of the products; the faster one counts
BEST_OF = 4


@dataclass(frozen=True)
class MachineRates:
    """Rates of a machine.

    Attributes:
        bandwidth: Bytes per second read from memory.
        working_set: Bytes that the decoder reads per step.
        working_bandwidth: Bytes per second when that many bytes are read repeatedly; above `bandwidth` if they stay in
            a cache.
        product_rows: Row counts of the measured products, ascending.
        cached_rates: FLOPs per second of products with that many rows and cached weights.
        memory_rates: The same with weights from memory.
        threads: Torch threads.
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
        """Measure this machine; takes a few seconds.

        Args:
            working_set: Bytes that the decoder reads per step.
            dtype: Dtype of the weights.
            device: Device of the weights.
        """
        bandwidth = read_bandwidth(LARGE, device)
        working = bandwidth if working_set >= LARGE else max(bandwidth, read_bandwidth(working_set, device))
        cached = [product_rate(rows, SMALL, dtype, device) for rows in PRODUCT_ROWS]
        memory = [product_rate(rows, LARGE, dtype, device) for rows in PRODUCT_ROWS]
        threads = torch.get_num_threads()
        return cls(bandwidth, working_set, working, PRODUCT_ROWS, tuple(cached), tuple(memory), threads)

    def rate_at(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """FLOPs per second at these row counts with cached weights: linear between those measured, constant beyond."""
        return np.interp(rows, self.product_rows, self.cached_rates)


def read_bandwidth(size: int, device: Any) -> float:
    """Bytes per second of repeatedly summing a tensor of `size` bytes."""
    numbers = torch.ones(max(1, size // 4), device=device)
    times = max(1, LARGE // 4 // numbers.nbytes)
    return times * numbers.nbytes / best_seconds(lambda: [numbers.sum() for _ in range(times)], device)


@torch.no_grad()
def product_rate(rows: int, size: int, dtype: torch.dtype, device: Any) -> float:
    """FLOPs per second of `[rows, inner]` times matrices of `size` bytes in total, one after the other."""
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
    """The shortest of several calls, after one warm-up call."""
    read = clock_on(device)
    call()
    found = []
    for _ in range(BEST_OF):
        start = read()
        call()
        found.append(read() - start)
    return max(min(found), 1e-9)
