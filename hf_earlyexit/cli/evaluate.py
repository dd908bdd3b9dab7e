"""The verbs `evaluate`, which measures a checkpoint, and `report`, which draws the results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_earlyexit.cli.arguments import (
    Verb,
    add_curve_argument,
    add_model_arguments,
    check_device,
    check_file,
    curves_of,
    load,
    model_path,
    positive,
    source_cut,
)
from hf_earlyexit.cli.data import (
    add_data_arguments,
    add_part_argument,
    add_partition_arguments,
    data_name,
    partition_of,
    read_examples,
)
from hf_earlyexit.common.output_files import refuse_overwriting, write_text
from hf_earlyexit.reports import terminal


EVALUATE = """\
Measure what a model's exits are worth: every threshold of some criteria, at several batch sizes and under both batch
rules, beside stock Transformers at full depth and a stock decoder cut to each exit. Quality with intervals, agreement
with full depth, layers, work, throughput, inter-token latency, encoder apart; each cell is timed beside stock on one
thread and stores the ratio. And how far each criterion is from the oracle, the first exit that agrees with full depth.
A run that was cut off goes on. What all of it shows, `hf-earlyexit report` draws.
"""
EVALUATE_EXAMPLE = """\
example:
  hf-earlyexit evaluate --output results.json
  hf-earlyexit evaluate --max-inputs 64 --curve softmax:2,4,6 0.9 0.5 --curve classifier 0.9 --batch-sizes 1 8 \\
      --output results.json
  hf-earlyexit evaluate --model my-exits --file validation.jsonl --prefix "summarize: " --output results.json
"""
REPORT = """\
Draw the results of an evaluation as one HTML file that opens offline, and as PNGs for papers.
"""
REPORT_EXAMPLE = """\
example:
  hf-earlyexit report results.json
  hf-earlyexit report results.json --html report.html --png figures --card certified/README.md
"""


# --- evaluate -------------------------------------------------------------------------------------------------------


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate`."""
    add_model_arguments(parser.add_argument_group("model"))
    inputs = parser.add_argument_group("inputs")
    add_data_arguments(inputs)
    add_part_argument(inputs)
    add_partition_arguments(inputs)
    text = parser.add_argument_group("generation")
    text.add_argument("--max-new-tokens", type=positive, metavar="N", help="tokens per text at most (the model's)")
    text.add_argument(
        "--max-source-tokens", type=positive, metavar="N", help="longer inputs are cut (as certified, else never)"
    )
    grid = parser.add_argument_group("what is measured")
    add_curve_argument(grid)
    grid.add_argument("--batch-sizes", type=positive, nargs="+", default=(1, 4, 8, 16), metavar="N", help="(1 4 8 16)")
    grid.add_argument("--batch-rules", nargs="+", default=("row", "batch"), metavar="RULE", help="(row batch)")
    grid.add_argument("--rounds", type=positive, default=31, metavar="N", help="batches to time each cell on (31)")
    grid.add_argument("--points", type=float, default=2.0, metavar="X", help="of ROUGE-L that may be lost (2.0)")
    files = parser.add_argument_group("files")
    files.add_argument("--output", required=True, metavar="FILE", help="JSON to write")
    files.add_argument("--journal", metavar="FILE", help="what is done so far, to go on from (FILE.journal)")


def evaluate(arguments: argparse.Namespace) -> int:
    """The verb `evaluate`."""
    outputs = {"--output": arguments.output, "--journal": journal_of(arguments)}
    for flag, path in outputs.items():
        check_file(flag, path)
    refuse_overwriting(outputs, [arguments.file, model_path(arguments)])
    check_device(arguments.device)
    curves = curves_of(arguments.curve)
    from hf_earlyexit.evaluation.grid import Grid
    from hf_earlyexit.evaluation.model_evaluation import evaluate_model

    grid = Grid(curves, arguments.batch_sizes, arguments.batch_rules, arguments.rounds, arguments.points)
    partition = partition_of(arguments)
    examples = read_examples(arguments, partition, unique=False, parts=arguments.part)
    model, tokenizer = load(arguments)
    results = evaluate_model(
        model,
        tokenizer,
        examples,
        grid,
        generation={"max_new_tokens": arguments.max_new_tokens} if arguments.max_new_tokens else {},
        max_source_tokens=source_cut(arguments, model),
        path=journal_of(arguments),
        data_name=data_name(arguments),
        parts=arguments.part,
        partition=partition,
    )
    write_text(arguments.output, json.dumps(results) + "\n")
    print(table_of(results))
    print(oracle_of(results))
    print(f"\nSee it: hf-earlyexit report {arguments.output}")
    files = {"output": arguments.output, "journal": journal_of(arguments)}
    print(json.dumps({**files, "cells": len(results["cells"]), "inputs": results["inputs"]["count"]}))
    return 0


def journal_of(arguments: argparse.Namespace) -> str:
    """Path of the journal."""
    return arguments.journal or f"{arguments.output}.journal"


def table_of(results: Mapping[str, Any]) -> str:
    """A table with one line per cell."""
    from hf_earlyexit.evaluation.questions import time_ratio

    header = ("", "rule", "batch", "layers", "ROUGE-L", "as full depth", "time", "tokens/s", "ms/token")
    cells = results["cells"]
    ratios = [time_ratio(results, cell)["median"] for cell in cells]
    lines = [
        _line(cell, results["quality"][cell["quality"]], ratio) for cell, ratio in zip(cells, ratios, strict=True)
    ]
    return terminal.table(header, lines)


def _line(cell: Mapping[str, Any], quality: Mapping[str, Any], ratio: float) -> tuple[str, ...]:
    time, scores = cell["time"], quality["scores"]
    between = time["ours"]["inter_token_ms"]["median"]
    return (
        cell["name"],
        cell["batch_exit"],
        f"{cell['batch_size']}",
        f"{quality['mean_layers']['mean']:.2f}",
        f"{scores['rougeL']['mean']:.1f}",
        f"{scores['consistency']['mean']:.1f}",
        f"{ratio:.2f}x",
        f"{time['ours']['tokens_per_second']:.0f}",
        "-" if between is None else f"{between:.1f}",
    )


def oracle_of(results: Mapping[str, Any]) -> str:
    """Sentences about how far the criteria are from the oracle."""
    from hf_earlyexit.reports.oracle_report import oracle_reading

    text = f"Oracle, a bound and no saving: {' '.join(oracle_reading(results))}"
    return f"\n{terminal.paragraph(text, 110)}"


# --- report ---------------------------------------------------------------------------------------------------------


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report`."""
    parser.add_argument("results", metavar="RESULTS", help="what `hf-earlyexit evaluate` wrote")
    parser.add_argument("--html", metavar="FILE", help="the page (RESULTS with .html)")
    parser.add_argument("--png", metavar="FOLDER", help="where to write the figures, too (nowhere)")
    parser.add_argument("--card", metavar="FILE", help="a model card that is to say what came out, too (none)")


def report(arguments: argparse.Namespace) -> int:
    """The verb `report`."""
    html = arguments.html or str(Path(arguments.results).with_suffix(".html"))
    check_file("--html", html)
    refuse_overwriting({"--html": html, "--card": arguments.card}, [arguments.results])
    if arguments.png is not None and Path(arguments.png).exists() and not Path(arguments.png).is_dir():
        raise ValueError(f"--png {arguments.png} is a file: name a folder")
    if arguments.card is not None and not Path(arguments.card).is_file():
        raise ValueError(f"--card {arguments.card} is no file: name the README.md of a checkpoint")
    from hf_earlyexit.reports.card_sections import WORTH, worth_section, write_section
    from hf_earlyexit.reports.report import read_results, write_report

    try:
        results = read_results(arguments.results)
        for path in write_report(results, html, arguments.png):
            print(path)
        if arguments.card is not None:
            write_section(arguments.card, WORTH, worth_section(results))
            print(arguments.card)
    except (LookupError, TypeError, AttributeError) as error:  # the file differs from what `evaluate` writes
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{arguments.results} is not as `hf-earlyexit evaluate` writes it ({problem})") from error
    return 0


VERBS = (
    Verb("evaluate", evaluate, "measure exits", EVALUATE, EVALUATE_EXAMPLE, add_evaluate_arguments),
    Verb("report", report, "draw an evaluation", REPORT, REPORT_EXAMPLE, add_report_arguments),
)
