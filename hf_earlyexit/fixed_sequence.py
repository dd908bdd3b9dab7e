"""Testing hypotheses in an order that was fixed beforehand, from one start or several, at one family-wise error rate.

Knows p-values only. What they are of is `calibration.py`.
"""

from __future__ import annotations

from collections.abc import Sequence


def rejected(p_values: Sequence[float], delta: float, starts: int = 1) -> tuple[int, ...]:
    """The hypotheses that are rejected, so that with probability `1 - delta` none of them is true.

    A graphical procedure (Bretz et al., Statistics in Medicine 28, 2009): every start has a share `delta / starts`, a
    rejected hypothesis hands all that it has on to the next one that is not rejected, and the last one to the first.
    With one start that is fixed-sequence testing. With several it is the fallback procedure (Wiens, 2003), whose last
    share comes round: a start whose first hypothesis fails waits for what other starts no longer need.

    Nothing is taken for granted of how p-values depend on each other.

    Args:
        p_values: In the order of the tests.
        delta: The family-wise error rate.
        starts: How many, spread evenly from the first hypothesis on; at most as many as there are hypotheses.
    """
    count = len(p_values)
    starts = min(starts, count)
    shares = [0] * count  # whole shares of delta / starts, so that all of them are delta exactly
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
    """A hypothesis that can be rejected. Which of several comes first does not change what is rejected in the end."""
    able = (
        place
        for place, (p_value, share) in enumerate(zip(p_values, shares, strict=True))
        if share and place not in found and p_value <= delta * (share / starts)
    )
    return next(able, None)
