"""Time measurement on a device: synchronised clocks, interleaved rounds, a time budget, memory bandwidth."""

from __future__ import annotations

import gc
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

from benchmarks.device_models import Contender


FEWEST_ROUNDS, MOST_ROUNDS = 3, 11


class Lengths(NamedTuple):
    """New tokens of a short and a long call. Their difference in time, or work, is that of the steps between."""

    short: int
    long: int


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, with the device synchronised before and after."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


class OutOfTime(Exception):
    """A warm-up exceeded its time limit."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the main thread after `seconds`. A running call into C finishes first."""

    def ring(*args):
        raise OutOfTime(f"it took longer than the {seconds:.0f} s that were left for it")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Budget:
    """Time budget of a benchmark in seconds, counted from construction."""

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds

    def left(self) -> float:
        return self.end - time.perf_counter()


@dataclass
class StepTimes:
    """Seconds of short and long calls, paired by round."""

    lengths: Lengths
    short: list[float] = field(default_factory=list)
    long: list[float] = field(default_factory=list)
    warm_up: float = 0.0
    mean_layers: float | None = None

    def add(self, length: int, seconds: float) -> None:
        (self.short if length == self.lengths.short else self.long).append(seconds)

    def summary(self, rows: int) -> dict[str, float]:
        """The values of a result row."""
        steps = self.lengths.long - self.lengths.short
        step = (median(self.long) - median(self.short)) / steps
        paired = [(long - short) / steps for long, short in zip(self.long, self.short, strict=True)]
        quarters = quantiles(paired, n=4, method="inclusive") if len(paired) > 1 else [step, step, step]
        layers = {} if self.mean_layers is None else {"mean_layers": self.mean_layers}
        return {
            "ms_per_step": 1e3 * step,
            "iqr_ms": 1e3 * (quarters[2] - quarters[0]),
            "rounds": len(paired),
            "call_ms": 1e3 * median(self.long),
            "tokens_per_s": rows * self.lengths.long / median(self.long),
            "warm_up_s": self.warm_up,
            **layers,
        }


def warm_up(one: Contender, times: StepTimes, device: torch.device, seconds: float) -> float:
    """Call twice at both lengths, so that everything is compiled and recorded; return the seconds of a round."""
    start, lengths = time.perf_counter(), sorted(times.lengths, reverse=True)
    with deadline(seconds):
        if one.depth is not None:
            times.mean_layers = one.depth(times.lengths.long)
        for new_tokens in lengths:
            output = one.call(new_tokens)
            if output.shape[1] != new_tokens + 1:
                raise RuntimeError(f"{output.shape[1] - 1} new tokens instead of {new_tokens}")
        synchronise(device)
        times.warm_up = time.perf_counter() - start
        return sum(seconds_of(lambda new=new: one.call(new), device) for new in lengths)


def rounds_for(round_seconds: float, share: float) -> int:
    """Number of rounds of a contender: what fits into `share` seconds, from `FEWEST_ROUNDS` to `MOST_ROUNDS`."""
    return max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(share / max(round_seconds, 1e-6))))


def takes_part(turn: int, turns: int, rounds: int) -> bool:
    """Whether a contender with `rounds` rounds, spread evenly over `turns` turns, is timed in this turn."""
    return (turn + 1) * rounds // turns > turn * rounds // turns


def measure_steps(
    contenders: Sequence[Contender],
    times: dict[str, StepTimes],
    rounds: dict[str, int],
    device: torch.device,
    order: random.Random,
    budget: Budget,
) -> None:
    """Time all contenders in turn, in a new random order every round. Stop early when the budget is spent."""
    turns = max(rounds.values(), default=0)
    gc.collect()
    gc.disable()
    try:
        for turn in range(turns):
            if turn >= FEWEST_ROUNDS and budget.left() < 0:
                return
            due = [one for one in contenders if takes_part(turn, turns, rounds[one.name])]
            calls = [(one, new_tokens) for one in due for new_tokens in times[one.name].lengths]
            order.shuffle(calls)
            for one, new_tokens in calls:
                times[one.name].add(new_tokens, seconds_of(lambda: one.call(new_tokens), device))  # noqa: B023
    finally:
        gc.enable()


def bandwidth(device: torch.device, mebibytes: int) -> float:
    """Bytes per second of a large copy on the device; bytes read and bytes written both count."""
    source = torch.randint(-128, 127, (mebibytes * 2**20,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    repeats = 5

    def copies() -> None:
        for _ in range(repeats):
            target.copy_(source)

    return 2 * source.numel() * repeats / median(seconds_of(copies, device) for _ in range(7))
