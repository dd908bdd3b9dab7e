"""Confidence intervals of means and ratios, by bootstrap over units."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from hf_earlyexit.common.extras import require


RESAMPLES = 2000
SEED = 0


def mean_interval(values: Sequence[float], units: Sequence[Hashable] | None = None) -> dict[str, float]:
    """The mean and the limits of its 95 % percentile bootstrap interval (`scipy.stats.bootstrap`), by name.

    Args:
        values: One for each input.
        units: The unit of each input; whole units are resampled. None: each input is its own unit.
    """
    return ratio_interval(values, np.ones(len(values)), units)


def ratio_interval(
    parts: Sequence[float], wholes: Sequence[float], units: Sequence[Hashable] | None = None
) -> dict[str, float]:
    """Like `mean_interval`, for the ratio of two sums, such as layers over tokens.

    Use it where inputs have different numbers of tokens.

    Args:
        parts: One for each input.
        wholes: Above 0, one for each input.
        units: As in `mean_interval`.

    Returns:
        `mean`, `low` and `high`. For one unit, or for equal ones, the limits equal the mean.
    """
    columns = _by_unit(np.asarray([parts, wholes], dtype=np.float64), units)
    ratios = columns[0] / columns[1]
    if ratios.min() == ratios.max():
        return dict.fromkeys(("mean", "low", "high"), float(ratios[0]))
    bootstrap = require("scipy.stats", "calibrate").bootstrap
    options = {"n_resamples": RESAMPLES, "method": "percentile", "paired": True, "random_state": SEED}
    low, high = bootstrap(tuple(columns), _ratio, **options).confidence_interval
    return {"mean": float(_ratio(*columns)), "low": float(low), "high": float(high)}


def _by_unit(columns: np.ndarray, units: Sequence[Hashable] | None) -> np.ndarray:
    """The sums over each unit."""
    if units is None:
        return columns
    place_of = {unit: place for place, unit in enumerate(dict.fromkeys(units))}
    places = [place_of[unit] for unit in units]
    return np.stack([np.bincount(places, weights=one) for one in columns])


def _ratio(parts: np.ndarray, wholes: np.ndarray, axis: int = -1) -> np.ndarray:
    return parts.sum(axis=axis) / wholes.sum(axis=axis)
