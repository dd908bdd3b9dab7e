"""Thresholds between observed confidences: no token's exit depends on how its confidence was rounded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


# Confidences this close are one confidence, rounded differently: the same token in another batch or by another kernel.
EQUALLY_SURE = 1e-6


def separating_thresholds(values: NDArray) -> tuple[NDArray, NDArray]:
    """For every distinct value the threshold that it and all larger ones pass, and no smaller one.

    Args:
        values: `[tokens]`, ascending, at least one, none below 0. Values within `EQUALLY_SURE` of the smallest of
            their kind count as one.

    Returns:
        `[distinct]`, the place in `values` of the first that passes, and `[distinct]`, the threshold: midway between
        that value and the one before it. The smallest value has none before it: its threshold is as far below it as
        the next one's is above it, but not below 0.
    """
    firsts = [0]
    while (place := int(np.searchsorted(values, values[firsts[-1]] + EQUALLY_SURE, side="right"))) < len(values):
        firsts.append(place)
    places = np.array(firsts)
    gap = values[places[1]] - values[0] if len(places) > 1 else 2 * EQUALLY_SURE
    lowest = max(0.0, float(values[0] - gap / 2))
    return places, np.array([lowest, *((values[places[1:] - 1] + values[places[1:]]) / 2)])
