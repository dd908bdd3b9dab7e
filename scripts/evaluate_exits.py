"""Evaluate a checkpoint's exits: quality, layers and time over thresholds, beside stock at full depth.

    python scripts/evaluate_exits.py --file validation.csv --prefix "describe: " --output found.json --plot curve.png

The unit is the distinct input, with all its references. Inputs are split in two halves: on the first ("select") a
setting is chosen, on the second ("report") it is reported. Every cell is timed beside stock `generate`, encoder
included, taking turns in one process on one thread; it stores the ratio. Cells that are in the output already are not
run again. The last line of stdout is JSON.

A curve is a criterion and its thresholds; `softmax:2,4` asks at the exit points 2 and 4 only:

    python scripts/evaluate_exits.py ... --curve softmax:2,4 0.3 0.6 0.9 --curve classifier 0.5 0.7 0.9
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_earlyexit.data import Example, column_pairs, group_by_input, halves, read_file, text_columns
from hf_earlyexit.default import CHECKPOINT
from hf_earlyexit.evaluation import (
    ALWAYS,
    FULL_DEPTH,
    Bench,
    Half,
    Setting,
    choose,
    distribution,
    evaluate,
    fingerprint,
    settings_of,
)
from hf_earlyexit.extras import require
from hf_earlyexit.machine import environment
from hf_earlyexit.settings import ExitSettings
from hf_earlyexit.timing import one_thread


CURVES = {
    "softmax": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "state": (0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99),
    "classifier": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
}

# --- what is shown --------------------------------------------------------------------------------------------------


def table(cells: Sequence[dict[str, Any]], sizes: Sequence[int]) -> str:
    """The report half and the times, as Markdown."""
    header = ["", "layers per token", "ROUGE-L", "BLEU", "as full depth", *(f"time, batch {size}" for size in sizes)]
    lines = [header, ["---"] * len(header)]
    for cell in cells:
        report, times = cell["report"], [cell["time"][str(size)]["cpu"] for size in sizes]
        scores = [f"{report[name]:.1f}" for name in ("rougeL", "bleu", "consistency")]
        ratios = [f"{ratio['median']:.2f}x" for ratio in times]
        lines.append([cell["name"], f"{report['mean_layers']:.2f}", *scores, *ratios])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(cells: Sequence[dict[str, Any]], sizes: Sequence[int], path: str, about: str) -> None:
    """ROUGE-L on the report half against layers run and against time, a line for each criterion."""
    pyplot = require("matplotlib.pyplot", "plot")
    require("matplotlib", "plot").use("Agg")
    axes = {"layers per token": lambda cell: cell["report"]["mean_layers"]}
    for size in sizes:
        axes[f"time over stock's, batch {size} (less is faster)"] = lambda cell, size=size: cell["time"][str(size)][
            "cpu"
        ]["median"]
    figure, panels = pyplot.subplots(1, len(axes), figsize=(5.2 * len(axes), 4.4), sharey=True, layout="constrained")
    for panel, (label, position) in zip(panels, axes.items()):
        draw_curves(panel, cells, position)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ROUGE-L, best of the references")
    panels[-1].legend(loc="lower right")
    figure.suptitle(about)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_curves(panel, cells: Sequence[dict[str, Any]], position) -> None:
    """One line for each curve, one for always leaving at a layer, and full depth."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        curves.setdefault(cell["curve"], []).append(cell)
    full = curves.pop(FULL_DEPTH)[0]
    panel.axhline(full["report"]["rougeL"], color="grey", linestyle=":", label=FULL_DEPTH)
    for name, points in curves.items():
        style = {"linestyle": "--", "color": "black", "marker": "s"} if name == ALWAYS else {"marker": "o"}
        panel.plot(
            [position(cell) for cell in points],
            [cell["report"]["rougeL"] for cell in points],
            label=name,
            markersize=4,
            **style,
        )


# --- the command line -----------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT), help="an early-exit checkpoint (the shipped one)")
    parser.add_argument("--file", required=True, help="inputs and references: .csv, .jsonl or .parquet")
    parser.add_argument("--source-column", help="column of the inputs (known names are found)")
    parser.add_argument("--target-column", help="column of the references (known names are found)")
    parser.add_argument("--prefix", default="", help="put before each input")
    parser.add_argument("--max-inputs", type=int, help="distinct inputs at most (all)")
    parser.add_argument("--max-new-tokens", type=int, help="tokens per text at most (the model's)")
    parser.add_argument("--batch-size", type=int, default=16, help="inputs at once where nothing is timed (16)")
    parser.add_argument("--timed-batch-sizes", type=int, nargs="+", default=[1, 8], metavar="N", help="(1 8)")
    parser.add_argument("--rounds", type=int, default=11, help="batches that are timed in each cell, 2 at least (11)")
    parser.add_argument(
        "--curve", nargs="+", action="append", metavar=("NAME", "THRESHOLD"), help=f"({', '.join(CURVES)})"
    )
    parser.add_argument("--points", type=float, default=2.0, help="points of ROUGE-L that may be lost (2.0)")
    parser.add_argument("--output", required=True, help="JSON to write; cells that it has are kept")
    parser.add_argument("--plot", help="PNG to draw; needs matplotlib")
    parser.add_argument("--distribution", help="JSON to write the chosen setting's exits to, token by token")
    args = parser.parse_args(arguments)
    if args.max_inputs is not None and args.max_inputs < 2:
        parser.error(f"--max-inputs {args.max_inputs}: at least 2 are needed, one for each half")
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: at least 2 are needed, for a spread")
    try:
        args.curves = {name: tuple(map(float, thresholds)) for name, *thresholds in args.curve or []}
    except ValueError as error:
        parser.error(f"--curve takes a name and thresholds: {error}")
    return args


def read_examples(args: argparse.Namespace) -> list[Example]:
    dataset = read_file(args.file)
    columns = text_columns(dataset.column_names, args.source_column, args.target_column)
    return group_by_input(column_pairs(dataset, *columns, prefix=args.prefix))[: args.max_inputs]


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate what is not in the output yet; write and draw it all."""
    args = parse(arguments)
    try:
        parts = dict(zip(("select", "report"), halves(read_examples(args))))
        bench = Bench(args.model, args.max_new_tokens, args.batch_size)
        settings = make_settings(bench, args.curves)
        earlier = cells_of(bench, args)
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
    sizes = args.timed_batch_sizes
    with one_thread():
        result = evaluate_all(bench, parts, settings, earlier, args)
        chosen = choose(result["cells"], args.points, sizes[0])
        if args.distribution and chosen is not None:
            write_json(args.distribution, exits_of(bench, parts["report"], result, chosen))
    if args.plot:
        about = f"{Path(args.model).name}, {result['inputs']['report']} inputs that nothing was chosen on"
        plot(result["cells"], sizes, args.plot, about)
    print(table(result["cells"], sizes))
    print(json.dumps({"output": args.output, "points": args.points, "chosen": chosen and chosen["name"]}))


def make_settings(bench: Bench, curves: dict[str, Sequence[float]]) -> list[Setting]:
    """All settings, each checked against the model; `CURVES` if none is named, as far as the model has classifiers."""
    built = bench.model.early_exit
    classifies = built.classifier is not None and built.classifier.trained
    curves = curves or {name: values for name, values in CURVES.items() if name != "classifier" or classifies}
    settings = settings_of(curves, built.exit_layers)
    for setting in settings:
        ExitSettings.merge(setting.keywords, None, None).check_against(built, bench.num_layers)
    return settings


def asked(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """What all cells of an output must have in common."""
    names = ("prefix", "max_inputs", "max_new_tokens", "timed_batch_sizes", "rounds")
    files = {"model": Path(args.model).name, "file": Path(args.file).name, "weights": fingerprint(bench.model)}
    return {**files, **{name: getattr(args, name) for name in names}}


def cells_of(bench: Bench, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The cells of an earlier run with this output, by name."""
    if not Path(args.output).exists():
        return {}
    earlier = json.loads(Path(args.output).read_text())
    if earlier["asked"] != asked(bench, args):
        raise ValueError(f"{args.output} has cells of another run, {earlier['asked']}: name another --output.")
    return {cell["name"]: cell for cell in earlier["cells"]}


def evaluate_all(
    bench: Bench,
    parts: dict[str, list[Example]],
    settings: Sequence[Setting],
    cells: dict[str, dict[str, Any]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """All cells, those that are there already included; the output is written after each."""
    splits = {name: Half(part, bench.generate(part, settings[0]).texts) for name, part in parts.items()}
    result = {
        "asked": asked(bench, args),
        "inputs": {name: len(part) for name, part in parts.items()},
        "max_new_tokens": bench.max_new_tokens,
        "environment": environment(),
    }
    for setting in tqdm([one for one in settings if one.name not in cells], desc="cells", unit="cell"):
        cells[setting.name] = evaluate(bench, splits, setting, args.timed_batch_sizes, args.rounds)
        write_json(args.output, {**result, "cells": list(cells.values())})
    return {**result, "cells": list(cells.values())}


def exits_of(bench: Bench, report: list[Example], result: dict[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
    """Where the tokens of the report half leave at this setting, text by text, as data to replay."""
    setting = Setting(cell["curve"], cell["threshold"], cell["keywords"])
    layers_run = bench.generate(report, setting).layers_run
    full_depth = next(one for one in result["cells"] if one["name"] == FULL_DEPTH)
    return {
        "about": f"Layers run by each token of {len(report)} texts; the setting was chosen on other inputs.",
        "setting": setting.keywords,
        "num_layers": bench.num_layers,
        "rougeL": {one["name"]: one["report"]["rougeL"] for one in (full_depth, cell)},
        "distribution": distribution(layers_run, bench.num_layers),
        "layers_run": layers_run,
    }


def write_json(path: str, values: dict[str, Any]) -> None:
    """At once or not at all."""
    unfinished = Path(f"{path}.tmp")
    unfinished.write_text(json.dumps(values) + "\n")
    unfinished.replace(path)


if __name__ == "__main__":
    main()
