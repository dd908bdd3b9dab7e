"""Benchmark of exits on a device, per decoding step: stock, ours at full depth, ours with exits, and a lower bound.

Weights are random, in the device's dtype; encoder states are computed beforehand; search is greedy, without an end
token. A step's time is the difference between calls for 32 and for 8 new tokens, divided by 24, with medians over
rounds. In each round all contenders take turns in random order, timed between device synchronisations. The lower
bound, called floor, is the time to read the step's bytes at the memory's bandwidth. The most important parts run
first. A part that the time budget does not reach, or a contender that fails, becomes a row with that status. The JSON
is rewritten after every row.

Example:
    python scripts/benchmark.py --device cuda --json-out benchmark-gpu.json --shapes large,base --batch 1,8
"""

from __future__ import annotations

import argparse
import gc
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.device_clock import (
    Budget,
    Lengths,
    StepTimes,
    bandwidth,
    measure_steps,
    rounds_for,
    warm_up,
)
from benchmarks.device_counts import counts_per_step
from benchmarks.device_models import DEVICE_SHAPES, EAGER_GRAPHS, FULL_DEPTH, STATIC, Contender, DeviceBench
from benchmarks.device_report import Report, machine
from benchmarks.whole_step import whole_step


SOURCE = 128
LARGE_BATCH = 16  # batches of at least this size run after the smaller ones of all shapes
FULL_DEPTH_AGAIN = "full depth"  # the fastest of ours at full depth, timed again together with its exits


PARTS = ("cell", "stock compiled", "counts")


class Unit(NamedTuple):
    """A part of the benchmark for one shape and batch size.

    "cell" measures ours and stock, "stock compiled" Transformers' own compiled path, "counts" the host operations of a
    step.
    """

    part: str
    shape: str
    rows: int


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {"type": lambda text: text.split(",")}
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--shapes", **names, default=["large", "base", "xl"], help="in this order (large,base,xl)")
    numbers = {"type": lambda text: [int(number) for number in text.split(",")]}
    parser.add_argument("--batch", **numbers, default=[1, 8, 32], help="rows (1,8,32)")
    parser.add_argument("--parts", **names, default=list(PARTS), help=f"of the work ({','.join(PARTS)})")
    parser.add_argument("--budget", type=float, default=340, help="seconds in all (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="(bfloat16 on CUDA, float32 on a CPU)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and order (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, one round: a check of the script")
    parser.add_argument("--json-out", type=Path, help="where the JSON goes")
    args = parser.parse_args(arguments)
    if args.quick:
        args.shapes, args.batch = ["tiny"], args.batch[:2]
    if unknown := sorted(set(args.shapes) - set(DEVICE_SHAPES)):
        parser.error(f"--shapes has {unknown}: choose from {','.join(DEVICE_SHAPES)}")
    if unknown := sorted(set(args.parts) - set(PARTS)):
        parser.error(f"--parts has {unknown}: choose from {','.join(PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args


def plan(shapes: Sequence[str], batches: Sequence[int], stock_compiled: bool) -> Iterator[Unit]:
    """The units, most important first, with few changes of shape: large batches run in reverse order of shapes."""
    small = [rows for rows in batches if rows < LARGE_BATCH]
    for shape in shapes:
        yield from (Unit("cell", shape, rows) for rows in small)
    for shape in reversed(shapes):
        yield from (Unit("cell", shape, rows) for rows in batches if rows >= LARGE_BATCH)
    if stock_compiled:
        yield from (Unit("stock compiled", shapes[0], rows) for rows in small)
    # Last: once a profiler has run, launches stay slower for the rest of the process.
    yield from (Unit("counts", shapes[0], rows) for rows in batches[:2])


class Runner:
    """Measures units and adds the results to a report."""

    def __init__(self, args: argparse.Namespace, report: Report, budget: Budget):
        self.args, self.report, self.budget = args, report, budget
        self.device, self.order = torch.device(args.device), random.Random(args.seed)
        self.bench: DeviceBench | None = None
        on_cuda = args.device == "cuda"
        self.lengths, self.counted = (Lengths(2, 6), Lengths(2, 4)) if args.quick else (Lengths(8, 32), Lengths(8, 16))
        self.share = 0.05 if args.quick else 2.5  # seconds for the rounds of one contender
        self.least = 15.0 if on_cuda else 0.5  # with fewer seconds left, no new unit is started
        self.bandwidth = bandwidth(self.device, 2048 if on_cuda else 8 if args.quick else 64)
        report.result["bandwidth_bytes_per_s"] = self.bandwidth

    def run(self, unit: Unit) -> None:
        if self.budget.left() < self.least:
            self.report.add(unit.shape, unit.rows, unit.part, status="skipped: out of time")
            return
        try:
            self.load(unit.shape)
            states = self.bench.random_states(unit.rows, SOURCE)
            {"cell": self.cell, "stock compiled": self.stock_compiled, "counts": self.counts}[unit.part](unit, states)
        except Exception as error:  # becomes a row of the table; other units go on
            self.report.add(unit.shape, unit.rows, unit.part, status=failure(error))

    def load(self, shape: str) -> None:
        """Make the models of the shape, after releasing those of another shape."""
        if self.bench is None or self.bench.shape != shape:
            self.bench = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            torch.manual_seed(self.args.seed)
            torch._dynamo.reset()
            self.bench = DeviceBench(shape, self.device, getattr(torch, self.args.dtype))

    # --- the parts of a unit ---------------------------------------------------------------------------------------

    def cell(self, unit: Unit, states: torch.Tensor) -> None:
        """Measure full depth of all contenders, then the exits of the fastest of ours."""
        self.floor(unit)
        full = self.make(unit, [("stock eager", lambda: self.bench.stock_eager(states))])
        full += self.make(unit, [(kind, lambda kind=kind: self.bench.full_depth(kind, states)) for kind in FULL_DEPTH])
        times = self.measure(unit, full)
        self.whole_steps(unit, states)
        ours = {kind: times[kind]["ms_per_step"] for kind in FULL_DEPTH if kind in times}
        if not ours:
            return
        fastest = min(ours, key=ours.get)
        self.report.note(unit.shape, unit.rows, fastest=fastest)
        again = self.bench.full_depth(fastest, states, FULL_DEPTH_AGAIN)
        exits = [again, *self.bench.exits(fastest, states)]
        exits += self.make(unit, [("stock cut to 1/2", lambda: self.bench.stock_half(states))])
        self.measure(unit, exits)

    def counts(self, unit: Unit, states: torch.Tensor) -> None:
        """Count operations of stock, of ours at full depth, and of exits on CUDA graphs.

        The graphs have eager kernels here, which saves the time to compile them.
        """
        makers = [("stock eager", lambda: self.bench.stock_eager(states))]
        makers += [(kind, lambda kind=kind: self.bench.full_depth(kind, states)) for kind in FULL_DEPTH[:3]]
        contenders = [*self.make(unit, makers), *self.bench.exits(FULL_DEPTH[2], states)]
        for one in contenders:
            for new_tokens in self.counted:
                one.call(new_tokens)  # warm-up: recording and compiling are not counted
        self.count(unit, contenders)

    def stock_compiled(self, unit: Unit, states: torch.Tensor) -> None:
        if self.budget.left() < 3 * self.least:
            self.report.add(unit.shape, unit.rows, "stock static + compile", status="skipped: out of time")
            return
        one = self.bench.stock_compiled(states)
        self.measure(unit, [one])

    def make(self, unit: Unit, makers: Sequence[tuple[str, Callable[[], Contender]]]) -> list[Contender]:
        """Make the contenders. One whose model cannot be made becomes a row with that status."""
        found = []
        for name, make in makers:
            try:
                found.append(make())
            except Exception as error:
                self.report.add(unit.shape, unit.rows, name, status=failure(error))
        return found

    def measure(self, unit: Unit, contenders: Sequence[Contender]) -> dict[str, dict[str, float]]:
        """Measure contenders; return the rows of those that could be measured. The others are rows in the report."""
        times, rounds = {one.name: StepTimes(self.lengths) for one in contenders}, {}
        for one in contenders:
            left = self.budget.left() - self.least / 2
            if left <= 0:
                self.report.add(unit.shape, unit.rows, one.name, status="skipped: out of time")
                continue
            try:
                round_seconds = warm_up(one, times[one.name], self.device, left)
                rounds[one.name] = 1 if self.args.quick else rounds_for(round_seconds, self.share)
            except Exception as error:
                self.report.add(unit.shape, unit.rows, one.name, status=failure(error))
        measured = [one for one in contenders if one.name in rounds]
        try:
            measure_steps(measured, times, rounds, self.device, self.order, self.budget)
        except Exception as error:
            for one in measured:
                self.report.add(unit.shape, unit.rows, one.name, status=failure(error))
            return {}
        found = {}
        for one in measured:
            if times[one.name].short and times[one.name].long:
                found[one.name] = times[one.name].summary(unit.rows)
                self.report.add(unit.shape, unit.rows, one.name, **found[one.name])
        return found

    def whole_steps(self, unit: Unit, states: torch.Tensor) -> None:
        """Measure the reference, a whole step as one graph, with compiled and with eager kernels."""
        for name, settings in (("whole step graph", STATIC), ("whole step graph, eager kernels", EAGER_GRAPHS)):
            try:
                seconds = whole_step(self.bench.prepared, states, self.lengths.long, dict(settings))
            except Exception as error:
                self.report.add(unit.shape, unit.rows, name, status=failure(error))
                continue
            if seconds is not None:
                self.report.add(unit.shape, unit.rows, name, ms_per_step=1e3 * seconds)

    def floor(self, unit: Unit) -> None:
        parts = self.bench.bytes_per_step(unit.rows, SOURCE, positions=sum(self.lengths) / 2)
        ms = 1e3 * sum(parts.values()) / self.bandwidth
        self.report.add(unit.shape, unit.rows, "floor", ms_per_step=ms, bytes=parts)

    def count(self, unit: Unit, contenders: Sequence[Contender]) -> None:
        for one in contenders:
            if self.budget.left() < self.least / 2:
                return
            try:
                counts = counts_per_step(one.call, self.device, self.counted)
            except Exception as error:
                counts = {"failed": failure(error)}
            self.report.add_counts(unit.shape, unit.rows, one.name, counts)


def failure(error: BaseException) -> str:
    """An error as one line, for a row's status."""
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:160]}"


def stop(*args: Any) -> None:
    raise SystemExit("stopped from outside; the table has what was known")


def main(arguments: Sequence[str] | None = None) -> None:
    args, start = parse(arguments), time.perf_counter()
    if args.device == "cpu":
        torch.set_num_threads(1)  # small matrices gain nothing from more
    budget = Budget(args.budget)
    report = Report(args.json_out, machine(args))
    signal.signal(signal.SIGTERM, stop)
    try:
        runner = Runner(args, report, budget)
        for unit in plan(args.shapes, args.batch, stock_compiled=not args.quick and args.device == "cuda"):
            if unit.part in args.parts:
                runner.run(unit)
    finally:
        report.result["seconds"] = round(time.perf_counter() - start, 1)
        if args.device == "cuda":
            report.result["peak_memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
        report.write()
        report.print_tables()


if __name__ == "__main__":
    main()
