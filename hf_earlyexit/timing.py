"""Answers for how long calls take beside each other, in one process: in turn, warmed up, by both clocks.

Times of one machine are noisy, ratios of calls that took turns much less so. Knows nothing of models.
"""

from __future__ import annotations

import gc
import random
import time
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
    """The clock to compare times by: the process's where work is the processor's, since others may use it, too."""
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
        """The time of `call` over the weighted sum of those it is held against, round by round."""
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
        rounds: Calls by name, the same names in all. Those of the first round warm up and are not timed.
        order: Who is first.
        after_round: Called after each that is timed.
    """
    turns = iter(rounds)
    calls = next(turns)
    names, times = list(calls), Times(list(calls))
    for call in calls.values():
        call()
    gc.disable()
    gc.freeze()  # what is there now stays: to look through it in every round takes longer than the calls
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
    """Torch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> AbstractContextManager[None]:
    """Torch on one thread, so that times do not depend on how many cores happen to be free."""
    return threads(1)
