"""Summary figures of a recipe's evaluation, and the table of all recipes.

Intervals are bootstrapped over inputs (95 %, percentile). All settings of a recipe share each draw of inputs, so that
an interpolated quality is resampled as a whole. Times are medians and are not resampled. Independent of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from hf_earlyexit.decoding.candidates import FULL_DEPTH
from hf_earlyexit.evaluation.intervals import RESAMPLES, SEED
from hf_earlyexit.training.model_card import markdown_table


Interval = dict[str, float]
LEAST_TIME, TIMES = 0.5, 501
COLUMNS = ("recipe", "asked at", "full depth", "against before", "at half of the layers", "area", "CPU s", "moved")


def summarize(results: Mapping[str, Any], curve: str) -> dict[str, Any]:
    """Quality at full depth and at half of the layers, area under quality over time, and the points of the curve.

    Args:
        results: Output of `evaluate_model` at batch size 1.
        curve: The curve whose points, together with full depth, are summarised.
    """
    names = [one["name"] for one in results["quality"].values() if one["curve"] in (curve, FULL_DEPTH)]
    per_input = [results["quality"][name]["per_input"] for name in names]
    quality = np.array([one["rougeL"] for one in per_input])
    tokens = np.array([one["tokens"] for one in per_input], dtype=float)
    layers = np.array([one["layers"] for one in per_input]) * tokens
    times = np.array([1.0 if name == FULL_DEPTH else time_of(results, name) for name in names])
    half = results["num_layers"] / 2

    def at_half(draw: np.ndarray) -> float:
        return quality_at(
            half, layers[:, draw].sum(axis=1) / tokens[:, draw].sum(axis=1), quality[:, draw].mean(axis=1)
        )

    def area(draw: np.ndarray) -> float:
        return area_under(times, quality[:, draw].mean(axis=1))

    count = quality.shape[1]
    reaches = (layers.sum(axis=1) / tokens.sum(axis=1)).min() <= half
    return {
        "curve": curve,
        "full_depth": interval(lambda draw: quality[names.index(FULL_DEPTH), draw].mean(), count),
        "at_half": interval(at_half, count) if reaches else None,  # a curve that always runs more layers has none
        "area": interval(area, count),
        "points": [
            {
                "name": name,
                "time": float(times[place]),
                "layers": float(layers[place].sum() / tokens[place].sum()),
                "rougeL": float(quality[place].mean()),
            }
            for place, name in enumerate(names)
        ],
        "rougeL_of_full_depth": quality[names.index(FULL_DEPTH)].tolist(),
    }


def time_of(results: Mapping[str, Any], name: str) -> float:
    """Time of a setting relative to stock, by the results' clock."""
    cell = next(one for one in results["cells"] if one["name"] == name)
    return cell["time"]["ratio"][results["asked"]["clock"]]["median"]


def quality_at(layers: float, own_layers: np.ndarray, quality: np.ndarray) -> float:
    """Quality at `layers` per token, interpolated linearly between points; outside of them, the nearest point's."""
    order = np.argsort(own_layers)
    return float(np.interp(layers, own_layers[order], quality[order]))


def area_under(times: np.ndarray, quality: np.ndarray) -> float:
    """Mean, over times from `LEAST_TIME` to 1, of the best quality within that time; 0 where no point is within it."""
    within = times[:, None] <= np.linspace(LEAST_TIME, 1, TIMES)
    return float(np.where(within, quality[:, None], 0.0).max(axis=0).mean())


def interval(statistic: Callable[[np.ndarray], float], count: int) -> Interval:
    """A statistic over all `count` inputs, and its bootstrap interval. `statistic` takes the drawn input indices."""
    places = np.arange(count)
    mean = float(statistic(places))
    options = {"n_resamples": RESAMPLES, "method": "percentile", "vectorized": False, "random_state": SEED}
    with np.errstate(invalid="ignore"):
        found = bootstrap((places,), statistic, **options).confidence_interval
    return {"mean": mean, "low": float(found.low), "high": float(found.high)}


def table(results: Mapping[str, Mapping[str, Any]], before: Mapping[str, Any], budget: str) -> str:
    """All recipes as a Markdown table, in their order, with 95 % intervals in brackets.

    Args:
        results: Results by name; `cost` is None for a checkpoint that was only evaluated.
        before: Result of the checkpoint that all recipes started from.
        budget: The budget in words.
    """
    rows = [_row(name, one, before) for name, one in results.items()]
    return f"Budget: {budget}. ROUGE-L x 100; 95 % intervals over inputs.\n\n{markdown_table(COLUMNS, rows)}"


def _row(name: str, one: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    points = one["curve"].partition(":")[2].replace(",", ", ")
    cells = [
        name,
        points,
        _shown(one["full_depth"]),
        _difference(one, before),
        _shown(one["at_half"]),
        _shown(one["area"]),
    ]
    cost = one["cost"]
    return cells + ([f"{cost['cpu_seconds']:.0f}", f"{cost['moved_parameters'] / 1e6:.2f} M"] if cost else ["-", "-"])


def _difference(one: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """Difference of full-depth quality to the plain checkpoint's, paired by input."""
    pairs = zip(one["rougeL_of_full_depth"], before["rougeL_of_full_depth"], strict=True)
    differences = np.array([own - other for own, other in pairs])
    if not differences.any():
        return "0 (the same)"
    return _shown(interval(lambda draw: differences[draw].mean(), len(differences)), "+.1f")


def _shown(found: Interval | None, style: str = ".1f") -> str:
    if found is None:
        return "-"
    return f"{found['mean']:{style}} ({found['low']:{style}} to {found['high']:{style}})"
