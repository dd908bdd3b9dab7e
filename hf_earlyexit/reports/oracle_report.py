"""The oracle in a report, as sentences, table and figure: how far each criterion is from the oracle's bound.

Takes the plain values of an evaluation (`oracle_curves.oracle_values`). Independent of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_earlyexit.evaluation.oracle_curves import OraclePoint, cheapest, oracle_layers
from hf_earlyexit.evaluation.questions import Results, curves, listed
from hf_earlyexit.reports.panels import COLOURS, GREY, MARKERS, panel_grid, shared_legend


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LEVELS = (0.9, 0.95, 0.98, 0.99)
SPOKEN = 0.95  # the level that the sentences use
SAME_LAYER = "always after the same layer"
NEAR = 90.0  # where the second panel starts, in per cent


def points_of(values: Sequence[dict[str, Any]]) -> list[OraclePoint]:
    """Plain values as `OraclePoint` objects."""
    return [OraclePoint(**one) for one in values]


# --- in words -------------------------------------------------------------------------------------------------------


def oracle_reading(results: Results) -> list[str]:
    """Sentences about the oracle; none if it was not measured."""
    found = results.get("oracle")
    if not found:
        return []
    return [_bound(found, results["num_layers"]), *_distance(found), *_ties(found)]


def _bound(found: dict[str, Any], num_layers: int) -> str:
    everywhere = next(iter(found["oracles"].values()))
    return (
        f"Of {found['tokens']} tokens of full depth, the first exit to make the same choice is after "
        f"{everywhere['first']['layers']:.2f} of {num_layers} layers in the mean, and all from "
        f"{everywhere['stable']['layers']:.2f} layers on make it."
    )


def _distance(found: dict[str, Any]) -> list[str]:
    rows = [row for row in oracle_rows(found) if row["curve"]]
    if not rows:
        return []
    place = LEVELS.index(SPOKEN)
    parts = [
        f"{row['name']} {row['cells'][place]['layers']:.2f} (its oracle {row['cells'][place]['oracle']:.2f})"
        for row in rows
    ]
    return [f"For {100 * SPOKEN:g} % of tokens to be full depth's, the layers per token are: {listed(parts)}."]


def _ties(found: dict[str, Any]) -> list[str]:
    if not (found["tied"] or found["rewritten"]):
        return []
    return [
        f"At {100 * found['tied']:.2f} % of tokens full depth's two best logits are equal, and the lower id is taken; "
        f"at {100 * found['rewritten']:.2f} % full depth, asked in one pass, would write another token than it wrote "
        "step by step, and exits are held against what it says in this pass."
    ]


def oracle_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Table rows: one per oracle, one for exiting always after the same layer, one per criterion.

    Returns:
        Rows with `name`, whether it is a criterion's `curve`, and `cells`, one per level of `LEVELS`: `layers`,
        `threshold` (None if there is none) and, for a criterion, the `oracle`'s layers at the same exit points.
    """
    oracles = {name: points_of(one["points"]) for name, one in found["oracles"].items()}
    rows = [
        {"name": _oracle_name(found, name), "curve": False, "cells": [_cell(oracle_layers(own, at)) for at in LEVELS]}
        for name, own in oracles.items()
    ]
    same = points_of(found["same_layer"])
    rows.append({"name": SAME_LAYER, "curve": False, "cells": [_cell(cheapest(same, at).layers) for at in LEVELS]})
    for curve, one in found["curves"].items():
        own, bound = points_of(one["points"]), oracles[_key(one)]
        rows.append({"name": curve, "curve": True, "cells": [_curve_cell(own, bound, at) for at in LEVELS]})
    return rows


def _cell(layers: float, threshold: float | None = None, oracle: float | None = None) -> dict[str, float | None]:
    return {"layers": layers, "threshold": threshold, "oracle": oracle}


def _curve_cell(points: Sequence[OraclePoint], bound: Sequence[OraclePoint], agreement: float):
    chosen = cheapest(points, agreement)
    return _cell(chosen.layers, chosen.threshold, oracle_layers(bound, agreement))


def _key(values: dict[str, Any]) -> str:
    return ",".join(map(str, values["exit_layers"]))


def _oracle_name(found: dict[str, Any], name: str) -> str:
    return "oracle" if name == next(iter(found["oracles"])) else f"oracle, asked at {name}"


def oracle_view(results: Results) -> dict[str, Any] | None:
    """What the page shows beside the figure; None if the oracle was not measured."""
    found = results.get("oracle")
    if not found:
        return None
    return {"reading": oracle_reading(results), "levels": LEVELS, "rows": oracle_rows(found)}


# --- as a figure ----------------------------------------------------------------------------------------------------


def oracle(results: Results) -> Figure | None:
    """Agreement with full depth against layers per token: the whole range and its upper end, criteria and oracles."""
    found = results.get("oracle")
    if not found:
        return None
    figure, panels = panel_grid(2, most_columns=2, size=(4.6, 3.8), sharex=True)
    for panel in panels:
        _draw(panel, results, found)
    panels[0].set(title="all", ylim=(None, 101.5))
    panels[1].set(title=f"from {NEAR:g} % on", ylim=(NEAR, 100.5))
    figure.supxlabel(f"layers per token that are chosen, of {results['num_layers']}", fontsize=10.5)
    figure.supylabel("tokens as full depth's, %", fontsize=10.5)
    shared_legend(figure, panels[:1])
    return figure


def _draw(panel: Axes, results: Results, found: dict[str, Any]) -> None:
    names = [*curves(results), *found["curves"]]  # in the colours of the other figures
    for name, one in found["curves"].items():
        number = list(dict.fromkeys(names)).index(name)
        _draw_curve(panel, name, one, COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)])
    same = points_of(found["same_layer"])
    _plot(panel, same, color="black", linestyle="--", marker=".", linewidth=1.2, label=SAME_LAYER)
    for name, dashes in zip(
        found["oracles"], ("-", "-.", (0, (6, 1, 1, 1, 1, 1)), ":") * len(found["oracles"]), strict=False
    ):
        points = points_of(found["oracles"][name]["points"])
        _plot(panel, points, color="black", linestyle=dashes, linewidth=1.8, label=_oracle_name(found, name))
        panel.plot(points[0].layers, 100, color="black", marker="*", markersize=11, linestyle="none")
    stable = next(iter(found["oracles"].values()))["stable"]["layers"]
    hollow = {"marker": "*", "markersize": 11, "mfc": "white", "linestyle": "none"}
    panel.plot(stable, 100, color=GREY, **hollow, label="oracle, all later exits agree, too")


def _draw_curve(panel: Axes, name: str, values: dict[str, Any], colour: str, marker: str) -> None:
    points = points_of(values["points"])
    asked = [place for place, one in enumerate(points) if one.threshold in values["asked"]]
    _plot(panel, points, color=colour, marker=marker, markevery=asked, markersize=4.5, linewidth=1.5, label=name)


def _plot(panel: Axes, points: Sequence[OraclePoint], **style: Any) -> None:
    panel.plot([one.layers for one in points], [100 * one.agreement for one in points], **style)
