"""Timing of calls side by side in one process, and of the parts of one call.

Calls alternate, are warmed up, and are read by two clocks: absolute times on one machine are noisy, ratios of
alternating calls much less so. A `Stopwatch` adds up the time of nested parts.
"""

from __future__ import annotations

import gc
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import repeat
from statistics import quantiles
from typing import Any

import torch


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Spread = dict[str, float]


def spread(values: Sequence[float]) -> Spread:
    """The median, and the interquartile range as a share of it."""
    low, median, high = quantiles(values, n=4, method="inclusive")
    return {"median": median, "iqr": (high - low) / median}


def clock_of(device: str) -> str:
    """The clock to compare times by: CPU time for CPU work, as other processes may use the CPU; else wall time."""
    return "cpu" if device == "cpu" else "wall"


class Times:
    """One measurement: seconds of every call in every round, by clock."""

    def __init__(self, names: Sequence[str]):
        self.seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in names} for clock in CLOCKS}

    def run(self, name: str, call: Callable[[], Any]) -> None:
        """Time a call."""
        starts = [read() for read in CLOCKS.values()]
        call()
        for (clock, read), start in zip(CLOCKS.items(), starts, strict=True):
            self.seconds[clock][name].append(read() - start)

    def ratio(self, call: str, against: Mapping[str, float], clock: str) -> Spread:
        """The time of `call` over the weighted sum of the times of `against`, round by round."""
        seconds = self.seconds[clock]
        parts = [[weight * second for second in seconds[name]] for name, weight in against.items()]
        return spread([ours / sum(each) for ours, *each in zip(seconds[call], *parts, strict=True)])


def measure(
    calls: Mapping[str, Callable[[], Any]], rounds: int, order: random.Random, after_round: Callable[[], Any] = int
) -> Times:
    """Warm up, then time every call once per round, in random order."""
    return take_turns(repeat(calls, rounds + 1), order, after_round)


def take_turns(
    rounds: Iterable[Mapping[str, Callable[[], Any]]], order: random.Random, after_round: Callable[[], Any] = int
) -> Times:
    """Time the calls of each round in random order; garbage is collected between rounds only.

    Args:
        rounds: Calls by name, the same names in all. The first round warms up and is not timed.
        order: Random generator for the order.
        after_round: Called after each timed round.
    """
    turns = iter(rounds)
    calls = next(turns)
    names, times = list(calls), Times(list(calls))
    for call in calls.values():
        call()
    gc.disable()
    gc.freeze()  # exempts existing objects: scanning them in every round takes longer than the calls
    try:
        for calls in turns:
            gc.collect()
            order.shuffle(names)
            for name in names:
                times.run(name, calls[name])
            after_round()
    finally:
        gc.unfreeze()
        gc.enable()
    return times


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> AbstractContextManager[None]:
    """Run torch with one thread, so that times do not depend on how many cores are free."""
    return threads(1)


def clock_on(device: torch.device | str) -> Callable[[], float]:
    """A clock in seconds for work on a device.

    CPU time where one CPU thread does the work, since other processes may use the CPU too. Otherwise wall time, after
    the device has finished its work.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return lambda: (torch.cuda.synchronize(device), time.perf_counter())[1]
    return CLOCKS[clock_of(device.type)] if torch.get_num_threads() == 1 else time.perf_counter


class Stopwatch:
    """Adds up seconds by part. Time outside all parts counts as `rest`, so the parts add up to the total.

    Args:
        read: The clock.
        rest: The name of the remainder.
    """

    def __init__(self, read: Callable[[], float], rest: str):
        self.read, self.running = read, [rest]
        self.seconds: Counter[str] = Counter()

    def start(self) -> None:
        """Start the clock."""
        self.last = self.read()

    def lap(self) -> None:
        """Add the time since the last reading to the running part."""
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
        """Wrap `function` so that its time counts as `part`."""

        def call(*args, **kwargs):
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return call
