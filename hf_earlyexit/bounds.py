"""Answers for the statistics of bounded losses: p-values and upper bounds of a risk, the mean of all losses to come.

Losses are in [0, 1] and rows are drawn independently. Knows nothing of candidates and of what is done with a p-value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from hf_earlyexit.extras import require


HALVINGS = 40  # of [0, 1], when a bound is sought: to 1e-12
MOST_OF_THE_WEALTH = 0.9  # that `betting` stakes at once. All of it would end the game at one loss of 1.


def hoeffding(totals: NDArray, n: int, risk: float | NDArray) -> NDArray:
    """exp(-2 n (risk - mean)^2), and 1 if the mean is no better than the risk; losses in [0, 1].

    Args:
        totals: `[K]`, sums of n losses.
        n: How many losses.
        risk: One, or one for each column.

    Returns:
        `[K]`, p-values of the hypothesis that the mean of all losses to come is at least `risk`.
    """
    return np.exp(-2 * n * np.maximum(0.0, risk - totals / n) ** 2)


def hoeffding_bentkus(totals: NDArray, n: int, risk: float | NDArray) -> NDArray:
    """The smaller of Hoeffding's tight p-value and Bentkus's (arXiv 2110.01052, section 3.2); as `hoeffding`.

    exp(-n h(min(mean, risk), risk)), h being the relative entropy of two coins; e P(Binomial(n, risk) <= ceil(total)).
    """
    special = require("scipy.special", "calibrate")
    means = np.minimum(totals / n, risk)
    entropy = special.rel_entr(means, risk) + special.rel_entr(1 - means, 1 - risk)
    return np.minimum(np.exp(-n * entropy), math.e * special.bdtr(np.ceil(totals), n, risk))


def clopper_pearson(totals: NDArray, n: int, risk: float | NDArray) -> NDArray:
    """P(Binomial(n, risk) <= total), exact for losses that are 0 or 1; as `hoeffding`."""
    return require("scipy.special", "calibrate").bdtr(totals, n, risk)


def betting(losses: NDArray, risk: float | NDArray, delta: float) -> NDArray:
    """Waudby-Smith and Ramdas's betting p-value (arXiv 2010.09686), with the bets of RCPS (arXiv 2101.02703).

    A gambler bets that losses are below `risk`, one row after the other; if they are not, the largest wealth exceeds
    1 / p with probability at most p (Ville). A bet depends on the rows before it only, so the order of the rows must
    not depend on their losses. Its size suits `delta`; the p-value holds for any.

    RCPS stakes at most 1 per unit of loss. Here it is 0.9 / (1 - risk), nine tenths of the most that a loss of 1 lets
    one pay: the limit is set by the largest loss only, so that widening the range for signed losses costs little. And
    a column whose mean is not below `risk` gets 1, though early luck may have made the gambler rich.

    Args:
        losses: `[n, K]`, in [0, 1].
        risk: One, or one for each column.
        delta: The level that the bets are sized for.

    Returns:
        `[K]`, as `hoeffding`.
    """
    return _betting(losses, _bets(losses, delta), risk)


def _betting(losses: NDArray, bets: NDArray, risk: float | NDArray) -> NDArray:
    bets = bets / np.maximum(1.0, bets * (1 - risk) / MOST_OF_THE_WEALTH)
    log_wealth = np.log1p(-bets * (losses - risk)).cumsum(axis=0)
    p_values = np.exp(-np.maximum(0.0, log_wealth.max(axis=0)))
    return np.where(losses.mean(axis=0) < risk, p_values, 1.0)


def _bets(losses: NDArray, delta: float) -> NDArray:
    """`[n, K]`, sqrt(2 ln(1 / delta) / (n variance)), with the variance of the rows before, from a prior of 1/4."""
    counts = np.arange(1, len(losses) + 1)[:, None] + 1
    means = (0.5 + losses.cumsum(axis=0)) / counts
    variances = (0.25 + ((losses - means) ** 2).cumsum(axis=0)) / counts
    before = np.vstack([np.full((1, losses.shape[1]), 0.25), variances[:-1]])
    return np.sqrt(2 * math.log(1 / delta) / (len(losses) * before))


# What depends on the losses by their sum only, so that what zero loss would prove costs no table.
FROM_TOTALS: dict[str, Callable[..., NDArray]] = {
    "hb": hoeffding_bentkus,
    "clopper_pearson": clopper_pearson,
    "hoeffding": hoeffding,
}
BOUNDS = ("hb", "wsr", "clopper_pearson", "hoeffding")


def p_values_of(losses: NDArray, risk: float | NDArray, *, bound: str, delta: float) -> NDArray:
    """`[K]`, of the hypotheses that the columns of `losses`, `[n, K]` in [0, 1], have a risk of at least `risk`."""
    return _p_values_by_risk(losses, bound=bound, delta=delta)(risk)


def _p_values_by_risk(losses: NDArray, *, bound: str, delta: float) -> Callable[[float | NDArray], NDArray]:
    """`p_values_of` as a function of the risk; what does not depend on it is computed once."""
    if bound == "wsr":
        return partial(_betting, losses, _bets(losses, delta))
    return partial(FROM_TOTALS[bound], losses.sum(axis=0), len(losses))


def upper_bounds_of(losses: NDArray, *, bound: str, delta: float) -> NDArray:
    """`[K]`, the smallest risks above the mean that are refuted at level `delta`, as larger ones are; 1 if none is.

    The p-values fall as the risk rises, so halving finds them, from above: a bound is never too small.
    """
    p_values = _p_values_by_risk(losses, bound=bound, delta=delta)
    refuted, standing = np.ones(losses.shape[1]), losses.mean(axis=0)
    for _ in range(HALVINGS):
        middle = (refuted + standing) / 2
        small = p_values(middle) <= delta
        refuted, standing = np.where(small, middle, refuted), np.where(small, standing, middle)
    return refuted
