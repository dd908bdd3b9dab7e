"""Measure a case until its ratios are steady; report it as JSON and as text."""

from __future__ import annotations

import argparse
import os
import platform
import random
from dataclasses import asdict
from itertools import groupby
from typing import Any

import torch
import transformers
from tqdm import tqdm

from benchmarks.models import Bar, Bench, Case, import_ctranslate2
from hf_earlyexit.common.machine import cpu_model, load
from hf_earlyexit.speed.timing import CLOCKS, Times, measure, spread


STEADY = 0.05


def covers(times: Times, bar: Bar) -> bool:
    """Whether all calls of a bar were measured."""
    return {bar.call, *bar.against} <= set(times.seconds["wall"])


def measure_until_steady(case: Case, args: argparse.Namespace, order: random.Random) -> list[Times]:
    """Measure the whole case, then up to `--repeat` times the bars whose ratios still spread too much."""
    found, bars = [], case.bars
    while bars and len(found) <= args.repeat:
        names = {name for bar in bars for name in (bar.call, *bar.against)}
        with tqdm(total=args.rounds, desc=f"{case.name} ({len(found) + 1})", unit="round") as progress:
            calls = {name: call for name, call in case.calls.items() if name in names}
            found.append(measure(calls, args.rounds, order, progress.update))
        bars = [bar for bar in bars if found[-1].ratio(bar.call, bar.against, args.clock)["iqr"] > STEADY]
    return found


def describe(case: Case, found: list[Times], decides: str) -> dict[str, Any]:
    """A case as values for the JSON; calls are those of the first measurement."""
    seconds = found[0].seconds
    calls = {name: {clock: spread(seconds[clock][name]) for clock in CLOCKS} for name in case.calls}
    bars = [describe_bar(bar, [times for times in found if covers(times, bar)], decides) for bar in case.bars]
    return {"name": case.name, "load": load(), "calls": calls, "bars": bars, "work": case.work}


def describe_bar(bar: Bar, found: list[Times], decides: str) -> dict[str, Any]:
    found = sorted(found, key=lambda times: times.ratio(bar.call, bar.against, decides)["iqr"])
    ratios = {clock: found[0].ratio(bar.call, bar.against, clock) for clock in CLOCKS}
    verdict = "beside" if bar.limit is None else "met" if ratios[decides]["median"] <= bar.limit else "missed"
    others = [times.ratio(bar.call, bar.against, decides) for times in found[1:]]
    return asdict(bar) | {"ratio": ratios, "verdict": verdict, "other_measurements": others}


def print_case(case: dict[str, Any], args: argparse.Namespace) -> None:
    print(f"\n## {case['name']}\n{args.rounds} rounds, load {case['load']}")
    print(f"{'call, ms':40} {'wall':>8} {'IQR':>6} {'CPU':>8} {'IQR':>6} {'wall/token':>11}")
    for name, clocks in case["calls"].items():
        times = " ".join(f"{1000 * one['median']:8.1f} {one['iqr']:6.1%}" for one in clocks.values())
        print(f"{name:40} {times} {1000 * clocks['wall']['median'] / args.new_tokens:11.2f}")
    print(f"{'ratio':40} {'wall':>8} {'IQR':>6} {'CPU':>8} {'IQR':>6} {'at most':>11}  by {args.clock}")
    for bar in case["bars"]:
        ratios = " ".join(f"{one['median']:8.3f} {one['iqr']:6.1%}" for one in bar["ratio"].values())
        print(f"{bar['name']:40} {ratios} {bar['limit'] or '':>11}  {remarks(bar, args.clock)}")
    for name, work in case["work"].items():
        print(f"{name}: " + "; ".join(f"{kind} {runs_text(counts)}" for kind, counts in work.items()))


def remarks(bar: dict[str, Any], decides: str) -> str:
    unsteady = f", spreads by more than {STEADY:.0%}" if bar["ratio"][decides]["iqr"] > STEADY else ""
    others = ", ".join(f"{one['median']:.3f} ({one['iqr']:.1%})" for one in bar["other_measurements"])
    return bar["verdict"] + unsteady + (f", other measurements {others}" if others else "")


def runs_text(counts: list[int]) -> str:
    """`[192, 48, 48]` as `192 48*2`. Counts are by layer from 1 on; `head_rows` from 0 on."""
    runs = [(count, len(list(run))) for count, run in groupby(counts)]
    return " ".join(f"{count}*{length}" if length > 1 else str(count) for count, length in runs)


def surroundings(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions, models and arguments, for the report."""
    shape = ("num_layers", "num_decoder_layers", "d_model", "num_heads", "d_kv", "d_ff", "vocab_size")
    modules = [torch, transformers] + ([import_ctranslate2()] if "ctranslate2" in args.cases else [])
    versions = {module.__name__: module.__version__ for module in modules}
    return {
        "cpu": f"{cpu_model()}, {os.cpu_count()} cores, threads used: {torch.get_num_threads()}",
        "versions": {"python": platform.python_version()} | versions,
        "model": {name: getattr(bench.ours.config, name) for name in shape} | {"dtype": str(bench.ours.dtype)},
        "attention": bench.ours.encoder.config._attn_implementation,
        "exit_layers": bench.ours.early_exit.exit_layers,
        "arguments": {name: getattr(args, name) for name in ("new_tokens", "rounds", "repeat", "clock", "seed")},
        "load_before": load(),
    }
