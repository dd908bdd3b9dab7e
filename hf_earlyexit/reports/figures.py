"""Matplotlib figures of an evaluation: quality, layers, confidence and time.

Each function takes the plain values of an evaluation and returns a figure, or None if there is nothing to show.
Independent of files and pages. The state of pyplot is not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from hf_earlyexit.common.extras import require
from hf_earlyexit.decoding.candidates import FULL_DEPTH, STATIC
from hf_earlyexit.evaluation.questions import CLOCKS, Results, choices, clock, curves, full_depth, time_ratio
from hf_earlyexit.reports.oracle_report import oracle
from hf_earlyexit.reports.panels import COLOURS, GREY, MARKERS, panel_grid, shared_legend


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# From the first layer to the last but one: blue is early, orange late. All are light enough for black letters.
LAYER_STOPS = ((0.42, 0.68, 0.93), (0.72, 0.87, 0.95), (0.98, 0.94, 0.70), (0.99, 0.76, 0.42), (0.93, 0.53, 0.33))
MOST_HISTOGRAMS = 6


def layer_colour(layer: int, num_layers: int) -> str:
    """The colour of tokens that exited after `layer`, as `#rrggbb`."""
    place = (layer - 1) / max(1, num_layers - 2) * (len(LAYER_STOPS) - 1)
    start = min(int(place), len(LAYER_STOPS) - 2)
    mixed = [low + (high - low) * (place - start) for low, high in zip(*LAYER_STOPS[start : start + 2], strict=True)]
    return "#" + "".join(f"{round(255 * min(1.0, part)):02x}" for part in mixed)


# --- quality --------------------------------------------------------------------------------------------------------


def quality_time(results: Results) -> Figure | None:
    """ROUGE-L against time relative to stock, a panel per batch size."""

    def place(cell: dict[str, Any], quality: dict[str, Any]) -> tuple[float, tuple[float, float]]:
        time = time_ratio(results, cell)
        return time["median"], (time["median"] * time["iqr"] / 2,) * 2

    label = f"time over stock's, {CLOCKS[clock(results)]} (1: as fast as stock, less: faster)"
    return _quality(results, place, label, at_stock=1.0)


def quality_layers(results: Results) -> Figure | None:
    """ROUGE-L against layers per token, a panel per batch size."""

    def place(cell: dict[str, Any], quality: dict[str, Any]) -> tuple[float, tuple[float, float]]:
        return quality["mean_layers"]["mean"], _spread(quality["mean_layers"])

    return _quality(results, place, f"layers per token, of {results['num_layers']}")


def _quality(results: Results, place: Callable, label: str, at_stock: float | None = None) -> Figure | None:
    sizes = _batch_sizes(results)
    if not sizes:
        return None
    figure, panels = panel_grid(len(sizes), most_columns=2, size=(4.3, 3.3), sharex=True, sharey=True)
    full, bottom = full_depth(results)["scores"]["rougeL"]["mean"], _bottom(results)
    for panel, size in zip(panels, sizes, strict=True):
        panel.set_title(f"batch size {size}" if size > 1 else "one text at a time")
        panel.axhline(full, color=GREY, linestyle=":", label="full depth")
        if at_stock is not None:
            panel.axvline(at_stock, color=GREY, linewidth=0.8)
        for curve, rule, style in _lines(results):
            cells = _cells(results, curve, rule, size)
            if curve == STATIC:
                cells = [cell for cell in cells if _rouge(results, cell)["mean"] >= bottom]
            _plot_quality(panel, results, cells, place, style)
    panels[0].set_ylim(bottom=bottom)  # the axis is shared, so it is set after everything is drawn
    figure.supxlabel(label, fontsize=10.5)
    figure.supylabel("ROUGE-L, best of the references", fontsize=10.5)
    shared_legend(figure, panels)
    return figure


def _plot_quality(
    panel: Axes, results: Results, cells: Sequence[dict[str, Any]], place: Callable, style: dict[str, Any]
) -> None:
    if not cells:
        return
    found = [(place(cell, results["quality"][cell["quality"]]), _rouge(results, cell)) for cell in cells]
    _, _, bars = panel.errorbar(
        [x for (x, _), _ in found],
        [rouge["mean"] for _, rouge in found],
        xerr=list(zip(*(error for (_, error), _ in found), strict=True)),
        yerr=list(zip(*(_spread(rouge) for _, rouge in found), strict=True)),
        elinewidth=0.8,
        **style,
    )
    for bar in bars:
        bar.set_alpha(0.35)


def _rouge(results: Results, cell: dict[str, Any]) -> dict[str, float]:
    return results["quality"][cell["quality"]]["scores"]["rougeL"]


def _spread(value: dict[str, float]) -> tuple[float, float]:
    """Distances from an interval's mean to its lower and upper end."""
    return max(0.0, value["mean"] - value["low"]), max(0.0, value["high"] - value["mean"])


def _bottom(results: Results) -> float:
    """Start of the ROUGE-L axis: below every criterion.

    Static decoders do not count: one with very few layers would compress the rest of the axis.
    """
    asked = curves(results) or [STATIC, FULL_DEPTH]
    return min(one["scores"]["rougeL"]["low"] for one in results["quality"].values() if one["curve"] in asked) - 1


def _lines(results: Results) -> Iterable[tuple[str, str, dict[str, Any]]]:
    """Curve, batch rule and style of every line: solid for rule `row`, light with hollow markers for rule `batch`."""
    yield STATIC, "row", _static_style(results)
    for number, curve in enumerate(curves(results)):
        look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4.5}
        yield curve, "row", {**look, "linewidth": 1.5, "label": f"{curve}, row"}
        yield curve, "batch", {**look, "linewidth": 1.0, "alpha": 0.5, "mfc": "white", "label": f"{curve}, batch"}


def _static_style(results: Results) -> dict[str, Any]:
    bottom = _bottom(results)
    below = [
        f"{one['threshold']:g}"
        for one in results["quality"].values()
        if one["curve"] == STATIC and one["scores"]["rougeL"]["mean"] < bottom
    ]
    label = f"{STATIC} (to {', '.join(below)} layers: below)" if below else STATIC
    return {"color": "black", "linestyle": "--", "marker": ".", "linewidth": 1.2, "label": label}


# --- layers and confidence ------------------------------------------------------------------------------------------


def layers_run(results: Results) -> Figure | None:
    """The share of tokens that ran 1, 2, ... layers, a panel per setting of `_worth_a_look`."""
    shown = _worth_a_look(results)
    if not shown:
        return None
    num_layers = results["num_layers"]
    layers = range(1, num_layers + 1)
    colours = [layer_colour(layer, num_layers) for layer in layers[:-1]] + ["white"]
    figure, panels = panel_grid(len(shown), most_columns=3, size=(2.9, 2.4), sharey=True)
    for panel, quality in zip(panels, shown, strict=True):
        panel.bar(layers, quality["distribution"], color=colours, edgecolor=GREY, linewidth=0.8)
        mean = quality["mean_layers"]["mean"]
        panel.axvline(mean, color="black", linestyle="--", linewidth=1)
        panel.set_title(f"{quality['name']}\nmean {mean:.2f}")
        panel.set_xticks([layer for layer in layers if (num_layers - layer) % math.ceil(num_layers / 8) == 0])
    figure.supxlabel("layers run", fontsize=10.5)
    figure.supylabel("share of tokens", fontsize=10.5)
    return figure


def _worth_a_look(results: Results) -> list[dict[str, Any]]:
    """The certified setting, those of the examples, the fastest of each curve; at most `MOST_HISTOGRAMS`.

    The fastest of a curve is among those within the quality tolerance.
    """
    certificate = results.get("certificate")
    names = [certificate["name"]] if certificate else []
    names += [one["name"] for one in results.get("examples", ())]
    good = [one for one in choices(results) if one.point and one.batch_exit == "row"]
    fastest: dict[str, str] = {}
    for one in sorted(good, key=lambda one: one.point.ratio):
        fastest.setdefault(one.curve, one.point.name)
    by_name = {one["name"]: one for one in results["quality"].values() if one["batch_exit"] == "row"}
    wanted = [name for name in dict.fromkeys([*names, *fastest.values()]) if name in by_name and name != FULL_DEPTH]
    return [by_name[name] for name in wanted[:MOST_HISTOGRAMS]]


def reliability(results: Results) -> Figure | None:
    """Share of exit predictions that agree with the last layer, against confidence: a line per exit."""
    found = {name: exits for name, exits in results.get("reliability", {}).items() if exits}
    if not found:
        return None
    figure, panels = panel_grid(len(found), most_columns=3, size=(3.1, 3.2), sharex=True, sharey=True)
    most = max(one["count"] for exits in found.values() for bins in exits.values() for one in bins)
    palette = require("matplotlib", "report").colormaps["viridis"]
    for panel, (criterion, exits) in zip(panels, found.items(), strict=True):
        panel.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1, label="as sure as right")
        for layer, bins in exits.items():
            colour = palette(0.88 * (int(layer) - 1) / max(1, results["num_layers"] - 2))
            places = [one["confidence"] for one in bins], [one["agreement"] for one in bins]
            panel.plot(*places, color=colour, linewidth=1.2, label=f"after layer {layer}")
            panel.scatter(*places, s=[4 + 90 * one["count"] / most for one in bins], color=colour, alpha=0.8)
        panel.set(title=criterion, xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    figure.supxlabel("mean confidence", fontsize=10.5)
    figure.supylabel("share that agrees with the last layer", fontsize=10.5)
    shared_legend(figure, panels)
    return figure


# --- time -----------------------------------------------------------------------------------------------------------


def latency(results: Results) -> Figure | None:
    """Milliseconds between tokens against the threshold, early exit and stock: a row of panels per batch size."""

    def lines(cells: Sequence[dict[str, Any]], who: str) -> dict[str, list[float]]:
        times = [cell["time"][who]["inter_token_ms"] for cell in cells]
        return {"median": [time["median"] for time in times], "p95": [time["p95"] for time in times]}

    return _over_thresholds(results, lines, "ms between tokens, wall clock")


def throughput(results: Results) -> Figure | None:
    """Tokens per second against the threshold, early exit and stock: a row of panels per batch size."""

    def lines(cells: Sequence[dict[str, Any]], who: str) -> dict[str, list[float]]:
        return {"median": [cell["time"][who]["tokens_per_second"] for cell in cells]}

    return _over_thresholds(results, lines, "tokens per second, wall clock")


def _over_thresholds(results: Results, lines: Callable, label: str) -> Figure | None:
    sizes, names = _batch_sizes(results), curves(results)
    if not sizes or not names:
        return None
    figure, panels = panel_grid(
        len(sizes) * len(names), most_columns=len(names), size=(2.7, 1.9), sharex="col", sharey="row"
    )
    styles = {(curve, rule): style for curve, rule, style in _lines(results)}
    for number, panel in enumerate(panels):
        row, column = divmod(number, len(names))
        size, curve = sizes[row], names[column]
        for rule in ("row", "batch"):
            _plot_times(
                panel, _cells(results, curve, rule, size), lines, styles[curve, rule], beside_stock=rule == "row"
            )
        panel.locator_params(axis="x", nbins=4)
        if row == 0:
            panel.set_title(curve)
        if column == 0:
            panel.set_ylabel(f"batch size {size}")
    for panel in panels[:: len(names)]:
        panel.set_ylim(bottom=0)  # the axis is shared by a row of panels, so it is set after everything is drawn
    figure.supxlabel("threshold (left: eager to leave)", fontsize=10.5)
    figure.supylabel(label, fontsize=10.5)
    shared_legend(figure, panels[:1])
    for handle in figure.legends[0].legend_handles:  # the first column's colour would suggest its criterion
        if handle.get_color() != GREY:
            handle.set_color("black")
    return figure


def _plot_times(
    panel: Axes, cells: Sequence[dict[str, Any]], lines: Callable, style: dict[str, Any], beside_stock: bool
) -> None:
    if not cells:
        return
    thresholds = [cell["threshold"] for cell in cells]
    name = f"early exit, {cells[0]['batch_exit']}"
    ours, stock = lines(cells, "ours"), lines(cells, "stock") if beside_stock else {}
    panel.plot(thresholds, ours["median"], **{**style, "label": name})
    if "p95" in ours and beside_stock:
        panel.plot(thresholds, ours["p95"], color=style["color"], linewidth=1, linestyle="--", label=f"{name}: p95")
    for kind, values in stock.items():
        dashes = {"linestyle": "--", "label": "stock: p95"} if kind == "p95" else {"label": "stock"}
        panel.plot(thresholds, values, color=GREY, linewidth=1, **dashes)


# --- shared ---------------------------------------------------------------------------------------------------------


def _batch_sizes(results: Results) -> list[int]:
    return sorted({cell["batch_size"] for cell in results["cells"]})


def _cells(results: Results, curve: str, rule: str, size: int) -> list[dict[str, Any]]:
    """The cells of a line, sorted by threshold."""
    key = (curve, rule, size)
    found = [cell for cell in results["cells"] if (cell["curve"], cell["batch_exit"], cell["batch_size"]) == key]
    return sorted(found, key=lambda cell: cell["threshold"])


FIGURES: dict[str, Callable[[Results], Any]] = {
    "quality_time": quality_time,
    "quality_layers": quality_layers,
    "layers_run": layers_run,
    "reliability": reliability,
    "oracle": oracle,
    "latency": latency,
    "throughput": throughput,
}
