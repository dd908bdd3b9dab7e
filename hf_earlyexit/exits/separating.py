"""Thresholds between observed confidences, so that no token's exit depends on rounding of its confidence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


# Closer confidences count as equal: they may come from the same token in another batch or computed by another kernel.
EQUALLY_SURE = 1e-6


def separating_thresholds(values: NDArray) -> tuple[NDArray, NDArray]:
    """For every distinct value, a threshold that it and all larger values pass, and no smaller value does.

    Args:
        values: `[tokens]`, ascending, at least one, none below 0. Values within `EQUALLY_SURE` of the smallest value
            of their group count as equal.

    Returns:
        `[distinct]`, the index in `values` of the first value that passes, and `[distinct]`, the threshold: midway
        between that value and the one before it. For the smallest value, the threshold is as far below it as the next
        threshold is above it, but not below 0.
    """
    firsts = [0]
    while (place := int(np.searchsorted(values, values[firsts[-1]] + EQUALLY_SURE, side="right"))) < len(values):
        firsts.append(place)
    places = np.array(firsts)
    gap = values[places[1]] - values[0] if len(places) > 1 else 2 * EQUALLY_SURE
    lowest = max(0.0, float(values[0] - gap / 2))
    return places, np.array([lowest, *((values[places[1:] - 1] + values[places[1:]]) / 2)])
