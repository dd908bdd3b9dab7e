"""Draw the cells of `benchmark.py --cases grid` as one figure, and print them as one Markdown table.

Shown is each call's time divided by stock's in the same round, as the median over rounds. Values below 1, left in the
figure, are faster than stock.

Example:
    python scripts/benchmark_plot.py calm.json base.json --png speed.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_earlyexit.common.extras import require


KINDS = {
    "stock cut": "#8c8c8c",
    "stock compiled": "#8c8c8c",
    "prompt": "#8c8c8c",
    "plain": "#9467bd",
    "int8": "#e377c2",
    "prepared": "#1f77b4",
    "compiled": "#d62728",
    "ctranslate2": "#2ca02c",
}


def ratios_of(case: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Median and interquartile range of each call's time relative to stock, by the call's name."""
    found = {}
    for bar in case["bars"]:
        name, _, against = bar["name"].rpartition(" / ")
        if against == "stock":
            found[name] = bar["ratio"]["wall"]
    return found


def shown(case: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Those of `ratios_of` that are ways to decode, which are drawn."""
    return {name: ratio for name, ratio in ratios_of(case).items() if name.startswith(tuple(KINDS))}


def kind_of(name: str) -> str:
    return next(kind for kind in KINDS if name.startswith(kind))


def draw(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a panel per cell, with a line per call."""
    pyplot = require("matplotlib.pyplot", "report")
    cases = [case for case in cases if shown(case)]
    sizes = [len(shown(case)) for case in cases]
    figure, panels = pyplot.subplots(
        len(cases), 1, figsize=(9, 0.26 * sum(sizes) + 0.9 * len(cases)), height_ratios=sizes, squeeze=False
    )
    for case, panel in zip(cases, panels[:, 0], strict=True):
        draw_cell(case, panel)
    figure.supxlabel("time over stock `generate`, left is faster (log scale)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_cell(case: dict[str, Any], panel: Any) -> None:
    """Draw one panel: the median as a dot and as a number, the interquartile range as a line."""
    found = shown(case)
    names = sorted(found, key=lambda name: -found[name]["median"])
    for place, name in enumerate(names):
        median, half = found[name]["median"], found[name]["median"] * found[name]["iqr"] / 2
        colour = KINDS[kind_of(name)]
        panel.plot([max(median - half, 0.01), median + half], [place, place], color=colour, linewidth=2, alpha=0.5)
        panel.plot([median], [place], "o", color=colour, markersize=5)
        panel.annotate(f"{median:.2f}x", (median, place), xytext=(8, -3), textcoords="offset points", fontsize=8)
    panel.set_xscale("log")
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_xlim(min(0.1, *(found[name]["median"] * 0.8 for name in names)), 2.5)
    ticks = [0.1, 0.2, 0.3, 0.5, 0.7, 1, 2]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    panel.minorticks_off()
    panel.grid(axis="x", alpha=0.3)
    panel.set_title(case["name"], fontsize=10, loc="left")


def table(cases: Sequence[dict[str, Any]]) -> str:
    """Markdown table with a row per call and a column per cell. In brackets: interquartile range over median."""
    columns = [ratios_of(case) for case in cases]
    names = list(dict.fromkeys(name for column in columns for name in column))
    lines = ["| time over stock's | " + " | ".join(case["name"] for case in cases) + " |"]
    lines.append("| --- |" + " --- |" * len(cases))
    for name in names:
        cells = (f"{one['median']:.2f} ({one['iqr']:.0%})" if (one := column.get(name)) else "" for column in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of benchmark.py")
    parser.add_argument("--png", type=Path, help="where to draw")
    args = parser.parse_args(arguments)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in args.results]
    cases = [case for result in results for case in result["cases"] if ratios_of(case)]
    print(table(cases))
    if args.png is not None:
        draw(cases, args.png)


if __name__ == "__main__":
    main()
