"""Benchmark of exits on one CPU thread: `generate` with exits against stock `generate`, in one process.

Models have random weights, since time does not depend on the generated text. The stock models share the same tensors.
All calls generate the same number of tokens (the end token is suppressed until then, for all models) from encoder
states computed beforehand, so that decoders are compared. Only in comparisons with CTranslate2 does the encoder run,
for all models. Criteria are evaluated at every layer but the last, "fixed" at its own layer.

A case is a set of calls that take turns, in a new random order every round. A bar compares one call with a sum of
other calls, round by round. Its ratio is the median over rounds, reported with the interquartile range as a share of
the median. If that share is above 5 %, the bar's calls are measured again; the measurement with the smallest spread
counts and all are listed. Missed bars are printed like met ones. The last line is one JSON object with everything,
times in seconds.

Example:
    python scripts/benchmark.py --cases batch1,rows --source 16,128 --json-out benchmark.json
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from benchmarks import device
from benchmarks.grid import Cell, GridBench, fill_case, shipped_case, vain_case
from benchmarks.mechanism import batch1_case, ctranslate2_case, phase_case, rows_case
from benchmarks.models import BATCH, Bench, Case, OwnBench, early_exit_config, import_ctranslate2, translator_of
from benchmarks.report import describe, measure_until_steady, print_case, surroundings

from hf_earlyexit.common.machine import load
from hf_earlyexit.speed.timing import CLOCKS


CASES = ("batch1", "rows", "phase", "ctranslate2")
GRID_CASES = ("grid", "vain", "fill", "shipped")
SHAPES = {
    "calm": (8, 512, 6, 64, 1024, 8000),
    "base": (12, 768, 12, 64, 2048, 8000),
    "large": (24, 1024, 16, 64, 2816, 8000),
    "tiny": (4, 32, 2, 16, 64, 100),
}
ENOUGH_ROUNDS = 31


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {"type": lambda text: text.split(","), "default": list(CASES)}
    numbers = {"type": lambda text: [int(number) for number in text.split(",")]}
    parser.add_argument("--cases", **names, help=f"which of {','.join((*CASES, *GRID_CASES))} ({','.join(CASES)})")
    parser.add_argument("--shape", choices=list(SHAPES), default="base", help="of grid, vain, fill (%(default)s)")
    parser.add_argument("--batch", **numbers, default=[1], help="rows of grid and fill (1)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="kinds of calls of grid (all)")
    parser.add_argument("--own", action="store_true", help="hold rows and phase against our own loop, all prepared")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of grid (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch and CTranslate2 (%(default)s)")
    parser.add_argument("--source", **numbers, default=[16, 128, 512], help="source tokens (16,128,512)")
    parser.add_argument("--leaving", **numbers, default=[0, 1, 4, 7, 8], help=f"k of {BATCH} rows (0,1,4,7,8)")
    parser.add_argument("--rounds", type=int, default=ENOUGH_ROUNDS, help="rounds of a measurement (%(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="further measurements at most (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=12, help="tokens of a call (%(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="of encoder and decoder each (%(default)s)")
    parser.add_argument("--d-model", type=int, default=768, help="width, a multiple of 64 (%(default)s)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="which decides (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and order (%(default)s)")
    parser.add_argument("--no-ctranslate2", action="store_true", help="leave CTranslate2 out")
    parser.add_argument("--quick", action="store_true", help="a tiny model and 3 rounds, to check the script")
    parser.add_argument("--json-out", type=Path, help="also write the JSON here")
    parser.add_argument("--device", help="cuda or cpu: the benchmark of a device; `--device cpu -h` lists its options")
    args = parser.parse_args(arguments)
    if unknown := sorted(set(args.cases) - {*CASES, *GRID_CASES}):
        parser.error(f"--cases has {unknown}: choose from {','.join((*CASES, *GRID_CASES))}")
    if args.layers < 3 or args.d_model % 64 or args.rounds < 2 or not set(args.leaving) <= set(range(BATCH + 1)):
        parser.error(f"at least 3 layers and 2 rounds, a width that 64 divides, 0 to {BATCH} leaving")
    if args.quick:
        args.rounds, args.repeat, args.new_tokens, args.source, args.shape = 3, 0, 8, args.source[:1], "tiny"
    args.cases = [name for name in args.cases if name != "ctranslate2" or not args.no_ctranslate2]
    return args


def make_grid_cases(bench: GridBench, args: argparse.Namespace) -> Iterator[Case]:
    """The requested cells, each made when it is due."""
    if "shipped" in args.cases:
        yield from (shipped_case(rows) for rows in args.batch)
    for source in args.source:
        for rows in args.batch:
            if "grid" in args.cases:
                yield Cell(bench, args.shape, rows, source, args.only).fill(not args.no_ctranslate2)
            if "fill" in args.cases:
                yield fill_case(bench, rows, source)
        if "vain" in args.cases:
            yield vain_case(bench, source)


def make_cases(bench: Bench, args: argparse.Namespace) -> Iterator[Case]:
    """The requested cases, each made when it is due."""
    if "batch1" in args.cases:
        yield batch1_case(bench, min(args.source))
    for length in args.source:
        if "rows" in args.cases:
            yield rows_case(bench, length, args.leaving)
        if "phase" in args.cases:
            yield phase_case(bench, length)
    if "ctranslate2" in args.cases:
        translator = translator_of(bench.stock[bench.layers])
        for rows in (1, BATCH):
            yield ctranslate2_case(bench, min(args.source), rows, translator)


def peak_memory() -> dict[str, int]:
    """Peak memory of this process in MiB. With `--only` and one kind of call beside stock, it is that kind's peak."""
    found = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.max_memory_allocated() // 2**20
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    if any(one.split("=")[0] == "--device" for one in (sys.argv[1:] if arguments is None else arguments)):
        device.main(arguments)
        return
    args, start = parse(arguments), time.perf_counter()
    if "ctranslate2" in args.cases:
        import_ctranslate2()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    on_grid, order = bool(set(args.cases) & set(GRID_CASES)), random.Random(args.seed)
    if on_grid:
        bench = GridBench(early_exit_config(*SHAPES[args.shape]), args.new_tokens)
        bench.ours.to(getattr(torch, args.dtype))
    else:
        sizes = (
            (3, 32, 2, 16, 64, 100) if args.quick else (args.layers, args.d_model, args.d_model // 64, 64, 2048, 8000)
        )
        bench = (OwnBench if args.own else Bench)(early_exit_config(*sizes), args.new_tokens)
    report = surroundings(bench, args)
    print("\n".join(f"{name}: {value}" for name, value in report.items()))
    if args.rounds < ENOUGH_ROUNDS:
        print(f"Fewer than {ENOUGH_ROUNDS} rounds: a check of the script, not a measurement.")
    report["cases"] = []
    for case in (make_grid_cases if on_grid else make_cases)(bench, args):
        report["cases"].append(describe(case, measure_until_steady(case, args, order), args.clock))
        print_case(report["cases"][-1], args)
    report |= {
        "peak_memory_mib": peak_memory(),
        "load_after": load(),
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    print(
        f"\nload_after: {report['load_after']}; {report['minutes']} minutes in all; memory {report['peak_memory_mib']}"
    )
    if args.json_out is not None:
        args.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
