"""P-values and upper bounds of a risk, the expected value of a bounded loss.

Losses are in [0, 1] and rows are drawn independently. Independent of candidates and of how p-values are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from hf_earlyexit.common.extras import require


HALVINGS = 40  # bisection steps on [0, 1] when searching for a bound: to 1e-12
MOST_OF_THE_WEALTH = 0.9  # largest share that `betting` stakes at once; with all of it, one loss of 1 ends the game


def hoeffding(totals: NDArray, n: int, risk: float | NDArray) -> NDArray:
    """exp(-2 n (risk - mean)^2), and 1 if the mean is no better than the risk; losses in [0, 1].

    Args:
        totals: `[K]`, sums of n losses.
        n: Number of losses.
        risk: One value, or one per column.

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

    A gambler bets that losses are below `risk`, one row after the other. If they are not, the largest wealth exceeds
    1/p with probability at most p (Ville). A bet depends only on the rows before it, so the order of the rows must not
    depend on their losses. The size of the bets is tuned to `delta`; the p-value is valid at any level.

    RCPS stakes at most 1 per unit of loss. The limit here is 0.9 / (1 - risk), nine tenths of the bet with which one
    loss of 1 would take all the wealth. It depends only on the largest loss, so widening the range for signed losses
    costs little. A column whose mean is not below `risk` gets 1, even if early luck made the wealth large.

    Args:
        losses: `[n, K]`, in [0, 1].
        risk: One value, or one per column.
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
    """`[n, K]`, sqrt(2 ln(1 / delta) / (n variance)), with the variance of the preceding rows, from a prior of 1/4."""
    counts = np.arange(1, len(losses) + 1)[:, None] + 1
    means = (0.5 + losses.cumsum(axis=0)) / counts
    variances = (0.25 + ((losses - means) ** 2).cumsum(axis=0)) / counts
    before = np.vstack([np.full((1, losses.shape[1]), 0.25), variances[:-1]])
    return np.sqrt(2 * math.log(1 / delta) / (len(losses) * before))


# Bounds that depend on the losses only through their sum: the case of zero loss needs no table.
FROM_TOTALS: dict[str, Callable[..., NDArray]] = {
    "hb": hoeffding_bentkus,
    "clopper_pearson": clopper_pearson,
    "hoeffding": hoeffding,
}
BOUNDS = ("hb", "wsr", "clopper_pearson", "hoeffding")


def p_values_of(losses: NDArray, risk: float | NDArray, *, bound: str, delta: float) -> NDArray:
    """`[K]`, p-values of the hypotheses that the columns of `losses [n, K]`, in [0, 1], have a risk >= `risk`."""
    return _p_values_by_risk(losses, bound=bound, delta=delta)(risk)


def _p_values_by_risk(losses: NDArray, *, bound: str, delta: float) -> Callable[[float | NDArray], NDArray]:
    """`p_values_of` as a function of the risk; the parts that do not depend on the risk are computed once."""
    if bound == "wsr":
        return partial(_betting, losses, _bets(losses, delta))
    return partial(FROM_TOTALS[bound], losses.sum(axis=0), len(losses))


def upper_bounds_of(losses: NDArray, *, bound: str, delta: float) -> NDArray:
    """`[K]`, the smallest risk above the mean that is rejected at level `delta`, as all larger ones are; 1 if none is.

    P-values fall as the risk rises, so bisection finds the bound. It approaches from above: a bound is never too
    small.
    """
    p_values = _p_values_by_risk(losses, bound=bound, delta=delta)
    refuted, standing = np.ones(losses.shape[1]), losses.mean(axis=0)
    for _ in range(HALVINGS):
        middle = (refuted + standing) / 2
        small = p_values(middle) <= delta
        refuted, standing = np.where(small, middle, refuted), np.where(small, standing, middle)
    return refuted
