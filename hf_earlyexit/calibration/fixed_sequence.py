"""Tests hypotheses in an order fixed beforehand, from one start or several, at one family-wise error rate.

Works on p-values only; `calibration/risk_control.py` computes them.
"""

from __future__ import annotations

from collections.abc import Sequence


def rejected(p_values: Sequence[float], delta: float, starts: int = 1) -> tuple[int, ...]:
    """The rejected hypotheses; with probability `1 - delta` none of them is true.

    A graphical procedure (Bretz et al., Statistics in Medicine 28, 2009): every start has a share `delta / starts`. A
    rejected hypothesis passes its whole share on to the next one that is not rejected, and the last one to the first.
    With one start this is fixed-sequence testing. With several it is the fallback procedure (Wiens, 2003), except that
    the last share wraps around: a start whose first hypothesis fails can still receive the shares that other starts no
    longer need.

    Makes no assumption about the dependence between p-values.

    Args:
        p_values: In the order of the tests.
        delta: The family-wise error rate.
        starts: Number of starts, spread evenly from the first hypothesis on; at most as many as there are hypotheses.
    """
    count = len(p_values)
    starts = min(starts, count)
    shares = [0] * count  # integer multiples of delta / starts, so that they sum to delta exactly
    for number in range(starts):
        shares[number * count // starts] += 1
    found: set[int] = set()
    while (one := _next(p_values, delta, starts, shares, found)) is not None:
        found.add(one)
        left = [(one + step) % count for step in range(1, count) if (one + step) % count not in found]
        if left:
            shares[left[0]] += shares[one]
        shares[one] = 0
    return tuple(sorted(found))


def _next(p_values: Sequence[float], delta: float, starts: int, shares: Sequence[int], found: set[int]) -> int | None:
    """A hypothesis that can be rejected. The order of rejections does not change the final set."""
    able = (
        place
        for place, (p_value, share) in enumerate(zip(p_values, shares, strict=True))
        if share and place not in found and p_value <= delta * (share / starts)
    )
    return next(able, None)
