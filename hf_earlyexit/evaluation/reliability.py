"""Reliability of confidences: at each exit, confidence against agreement with full depth.

Works on teacher-forced tokens (`evaluation/forced.py`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_earlyexit.evaluation.forced import ForcedTokens


BINS = 10
Bins = list[dict[str, float]]


def reliability(forced: ForcedTokens) -> dict[str, dict[str, Bins]]:
    """For each criterion and exit layer, confidences in tenths: mean confidence, share that agrees, and count."""
    agrees = forced.agrees.double().numpy()
    return {
        name: {
            str(layer): bins(values.numpy()[:, column], agrees[:, column])
            for column, layer in enumerate(forced.layers)
        }
        for name, values in forced.confidences.items()
    }


def bins(confidences: NDArray, agrees: NDArray) -> Bins:
    """The non-empty tenths of [0, 1], ascending; 1 is in the last one."""
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
