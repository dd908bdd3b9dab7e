"""Answers for how far a mean over units could be off: bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_earlyexit.extras import require


RESAMPLES = 2000
SEED = 0


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """The mean, and the limits of its 95 % percentile bootstrap interval (`scipy.stats.bootstrap`), by name.

    Args:
        values: One for each unit. Of one, or of equal ones, the interval is the mean.
    """
    numbers = np.asarray(values, dtype=np.float64)
    mean = float(numbers.mean())
    if numbers.min() == numbers.max():
        return {"mean": mean, "low": mean, "high": mean}
    bootstrap = require("scipy.stats", "calibrate").bootstrap
    options = {"n_resamples": RESAMPLES, "method": "percentile", "random_state": SEED}
    low, high = bootstrap((numbers,), np.mean, **options).confidence_interval
    return {"mean": mean, "low": float(low), "high": float(high)}
