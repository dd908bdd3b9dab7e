"""Answers for where time goes in code that calls parts within parts: every moment belongs to the innermost one.

Knows nothing of models.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from hf_earlyexit.timing import CLOCKS, clock_of


def clock_on(device: torch.device | str) -> Callable[[], float]:
    """Reads seconds: of the processor where one thread of it does the work, since others may use it, too; else of the
    wall, once the device has done what it was told."""
    device = torch.device(device)
    if device.type == "cuda":
        return lambda: (torch.cuda.synchronize(device), time.perf_counter())[1]
    return CLOCKS[clock_of(device.type)] if torch.get_num_threads() == 1 else time.perf_counter


class Stopwatch:
    """Adds up seconds by part. What no part claims belongs to `rest`, so that all add up to the whole.

    Args:
        read: The clock.
        rest: The name of the remainder.
    """

    def __init__(self, read: Callable[[], float], rest: str):
        self.read, self.running = read, [rest]
        self.seconds: Counter[str] = Counter()

    def start(self) -> None:
        """From now on, time belongs to someone."""
        self.last = self.read()

    def lap(self) -> None:
        """What has passed since the last time belongs to the part that is running."""
        now = self.read()
        self.seconds[self.running[-1]] += now - self.last
        self.last = now

    def enter(self, part: str) -> None:
        self.lap()
        self.running.append(part)

    def leave(self) -> None:
        self.lap()
        self.running.pop()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time belonging to `part`."""

        def call(*args, **kwargs):
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return call
