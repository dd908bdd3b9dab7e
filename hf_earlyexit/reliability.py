"""Answers for whether confidences mean what they say: of each exit, confidence against agreement with full depth.

Takes tokens of texts that were forced on the exits (`forced.py`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_earlyexit.forced import ForcedTokens


BINS = 10
Bins = list[dict[str, float]]


def reliability(forced: ForcedTokens) -> dict[str, dict[str, Bins]]:
    """Of each criterion and exit layer, confidences in tenths: their mean, the share that agrees, and how many."""
    agrees = forced.agrees.double().numpy()
    return {
        name: {
            str(layer): bins(values.numpy()[:, column], agrees[:, column])
            for column, layer in enumerate(forced.layers)
        }
        for name, values in forced.confidences.items()
    }


def bins(confidences: NDArray, agrees: NDArray) -> Bins:
    """Tenths of [0, 1] with anything in them, ascending; 1 is in the last one."""
    place = np.minimum((confidences * BINS).astype(int), BINS - 1)
    return [
        {
            "confidence": float(confidences[place == one].mean()),
            "agreement": float(agrees[place == one].mean()),
            "count": int((place == one).sum()),
        }
        for one in range(BINS)
        if (place == one).any()
    ]
