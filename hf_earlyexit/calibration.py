"""Answers for the statistics of choosing a threshold with a guarantee: `calibrate`, on a table of losses.

It knows neither model nor threshold: a column is whatever its losses were measured at. What it takes for granted: rows
are inputs, drawn independently and like those to come (tokens of one text are not); the candidates and their order
were fixed before anyone looked at a loss; and what is measured is what will run: decoding, batch rule, length, dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_earlyexit.extras import require


METHODS = ("ltt", "ucb", "crc")
HALVINGS = 40  # of [0, 1], when a bound is sought: to 1e-12
MOST_OF_THE_WEALTH = 0.9  # that `betting` stakes at once. All of it would end the game at one loss of 1.
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` chose, what it saw, and what was asked.

    Attributes:
        index: The chosen column; None: none is good enough, never exit.
        accepted: How many columns, counted from the most conservative, keep the guarantee. All of them do at once, so
            any of them may be used in place of the chosen one.
        means: Of each column, the mean loss seen.
        upper_bounds: Of each column, by itself: its risk is at most this with probability `1 - delta`. For `"crc"`
            what the target is compared with, (n mean + loss_upper) / (n + 1), which bounds no single column's risk.
        p_values: Of each column, of the hypothesis that its risk is above the target. None for `"crc"`.
        n: Inputs.
        target: Of the risk, in units of the losses.
        delta: Of the guarantee; None for `"crc"`, which has none.
        method: `"ltt"`, `"ucb"` or `"crc"`.
        bound: A name in `BOUNDS`; None for `"crc"`, which uses none.
        loss_lower: No loss is below.
        loss_upper: No loss is above.
    """

    index: int | None
    accepted: int
    means: tuple[float, ...]
    upper_bounds: tuple[float, ...]
    p_values: tuple[float, ...] | None
    n: int
    target: float
    delta: float | None
    method: str
    bound: str | None
    loss_lower: float
    loss_upper: float


def calibrate(
    losses: ArrayLike,
    costs: ArrayLike,
    *,
    target: float,
    delta: float = 0.1,
    method: str = "ltt",
    bound: str = "hb",
    loss_lower: float = 0.0,
    loss_upper: float = 1.0,
) -> Calibration:
    """Choose the cheapest column whose risk, the mean loss over inputs to come, is shown to be at most `target`.

    Columns are walked from the first; the walk ends before the first that is not shown to be safe. Of those before it
    the cheapest is chosen, and of equally cheap ones the most conservative. CALM takes the last one instead, which is
    the same where costs descend.

    Args:
        losses: `[n, K]`, of input i at candidate k, from the most conservative candidate to the most eager. A loss is
            measured against never exiting, which by itself loses 0. Signed losses are below 0 where exiting wins.
        costs: `[K]`, of each candidate, such as layers per token. They may come from these same inputs and need not
            descend.
        target: What the risk must not exceed, between 0 and `loss_upper`.
        delta: The probability, over the draw of the calibration inputs, that the guarantee fails.
        method: `"ltt"` tests each column (Learn then Test with a fixed sequence, arXiv 2110.01052) and `"ucb"`
            compares an upper bound with the target (RCPS, arXiv 2101.02703). With probability `1 - delta` every
            accepted column has a risk of at most `target`, whether or not risks rise with eagerness. Here both come
            from one bound and agree: `"ucb"` is for who thinks in bounds.
            `"crc"` (conformal risk control, arXiv 2208.02814) promises less: a loss of at most `target` in expectation
            over the calibration inputs and the one to come. `delta` and `bound` play no part. It needs losses that
            never fall with eagerness, from the 0 of never exiting on, so each row's running maximum, and at least 0,
            is taken: signed losses gain nothing there.
        bound: `"hb"` (Hoeffding-Bentkus), `"wsr"` (betting), `"hoeffding"`, `"clopper_pearson"` (exact, losses of 0
            and 1). Only `"hb"` and `"clopper_pearson"` need scipy: `pip install hf-earlyexit[calibrate]`.
        loss_lower: 0, or less for signed losses. They are rescaled to [0, 1]. `"wsr"` loses little by it; `"hb"` and
            `"hoeffding"` pay for the width of the range, and with them losses clipped at 0 (CALM's) mostly do better.
        loss_upper: The largest loss there can be, not the largest seen.

    Raises:
        ValueError: Something is not as said above, or n is too small for the target even at zero loss.
        ImportError: The bound needs scipy.
    """
    asked = _Asked(target, delta, method, bound, loss_lower, loss_upper)
    table = _read_losses(losses, asked)
    prices = _read_costs(costs, columns=table.shape[1])
    asked.check_enough(len(table))
    decide = _decide_by_expectation if method == "crc" else _decide_with_confidence
    passed, upper_bounds, p_values = decide(table, asked)
    accepted = count_accepted(passed)
    return Calibration(
        index=int(prices[:accepted].argmin()) if accepted else None,
        accepted=accepted,
        means=tuple(table.mean(axis=0).tolist()),
        upper_bounds=tuple(upper_bounds.tolist()),
        p_values=None if p_values is None else tuple(p_values.tolist()),
        n=len(table),
        **asked.recorded(),
    )


def inputs_needed(
    *,
    target: float,
    delta: float = 0.1,
    method: str = "ltt",
    bound: str = "hb",
    loss_lower: float = 0.0,
    loss_upper: float = 1.0,
) -> int:
    """The fewest inputs with which `calibrate`, asked so, accepts a column that never loses anything.

    Columns that do lose need more: where the mean loss is half the target, `"hb"` needs six times as many.

    Raises:
        ValueError: As `calibrate`.
    """
    return _Asked(target, delta, method, bound, loss_lower, loss_upper).inputs_needed()


def split_delta(delta: float, calibrations: int) -> float:
    """The delta for each of several calibrations on the same inputs, of which the best will be used.

    All their guarantees then hold together with probability `1 - delta` (union bound). There is no such split for
    `"crc"`: take new inputs after choosing.

    Raises:
        ValueError: `delta` is not between 0 and 1, or `calibrations` is not a number of at least 1.
    """
    _check_between("delta", delta, 0, 1)
    if not isinstance(calibrations, int) or isinstance(calibrations, bool) or calibrations < 1:
        raise ValueError(f"`calibrations` must be a whole number of at least 1, got {calibrations!r}.")
    return delta / calibrations


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
    bets = _bets(losses, delta)
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
    if bound == "wsr":
        return betting(losses, risk, delta)
    return FROM_TOTALS[bound](losses.sum(axis=0), len(losses), risk)


def upper_bounds_of(losses: NDArray, *, bound: str, delta: float) -> NDArray:
    """`[K]`, the smallest risks above the mean that are refuted at level `delta`, as larger ones are; 1 if none is.

    The p-values fall as the risk rises, so halving finds them, from above: a bound is never too small.
    """
    refuted, standing = np.ones(losses.shape[1]), losses.mean(axis=0)
    for _ in range(HALVINGS):
        middle = (refuted + standing) / 2
        small = p_values_of(losses, middle, bound=bound, delta=delta) <= delta
        refuted, standing = np.where(small, middle, refuted), np.where(small, standing, middle)
    return refuted


def count_accepted(passed: NDArray) -> int:
    """How many pass before the first that does not (fixed-sequence testing: each is tested at the full delta)."""
    return int(np.logical_and.accumulate(passed).sum())


@dataclass(frozen=True)
class _Asked:
    """What is asked of a calibration, checked, and in units where losses are in [0, 1]."""

    target: float
    delta: float
    method: str
    bound: str
    loss_lower: float
    loss_upper: float

    def __post_init__(self):
        _check_name("method", self.method, METHODS)
        _check_name("bound", self.bound, BOUNDS)
        _check_between("delta", self.delta, 0, 1)
        self._check_range()
        _check_between("target", self.target, 0, self.loss_upper)

    def _check_range(self) -> None:
        _check_between("loss_upper", self.loss_upper, 0, math.inf)
        if not _is_number(self.loss_lower) or not -math.inf < self.loss_lower <= 0:
            raise ValueError(
                f"`loss_lower` must be a finite number of at most 0, got {self.loss_lower!r}: never exiting loses 0."
            )
        if self._is_binary and (self.loss_lower, self.loss_upper) != (0, 1):
            raise ValueError(
                f"`bound` 'clopper_pearson' is for losses of 0 and 1, got `loss_lower` {self.loss_lower!r} and "
                f"`loss_upper` {self.loss_upper!r}: leave them out, or use 'hb' or 'wsr'."
            )

    @property
    def _is_binary(self) -> bool:
        return self.method != "crc" and self.bound == "clopper_pearson"

    def to_unit(self, losses: float | NDArray) -> Any:
        return (losses - self.loss_lower) / (self.loss_upper - self.loss_lower)

    def from_unit(self, losses: NDArray) -> NDArray:
        return self.loss_lower + (self.loss_upper - self.loss_lower) * losses

    def check_losses(self, table: NDArray) -> None:
        lowest, highest = table.min(), table.max()
        if not self.loss_lower <= lowest <= highest <= self.loss_upper:
            raise ValueError(
                f"`losses` must be within `loss_lower` {self.loss_lower!r} and `loss_upper` {self.loss_upper!r}, got "
                f"losses from {lowest} to {highest}: give the range that losses can have, or clip them."
            )
        if self._is_binary and not ((table == 0) | (table == 1)).all():
            other = table[(table != 0) & (table != 1)][0]
            raise ValueError(
                f"`losses` must be 0 or 1 for `bound` 'clopper_pearson', got {other}: use 'hb' or 'wsr' for others."
            )

    def check_enough(self, n: int) -> None:
        if not self.is_enough(n):
            confidence = "" if self.method == "crc" else f" with `delta` {self.delta!r} by {self.bound!r}"
            raise ValueError(
                f"`losses` has {n} rows: n is too small for a `target` of {self.target!r}{confidence} even at zero "
                f"loss. {self.inputs_needed()} inputs are needed, and more where there are losses."
            )

    def is_enough(self, n: int) -> bool:
        """Whether n inputs without any loss would be accepted."""
        if self.method == "crc":
            return self.loss_upper / (n + 1) <= self.target
        zero, target = self.to_unit(0.0), self.to_unit(self.target)
        if self.bound == "wsr":
            return bool(betting(np.full((n, 1), zero), target, self.delta)[0] <= self.delta)
        return bool(FROM_TOTALS[self.bound](n * zero, n, target) <= self.delta)

    def inputs_needed(self) -> int:
        enough = 1
        while not self.is_enough(enough):
            enough *= 2
        too_few = enough // 2
        while enough - too_few > 1:
            middle = (enough + too_few) // 2
            enough, too_few = (middle, too_few) if self.is_enough(middle) else (enough, middle)
        return enough

    def recorded(self) -> dict[str, Any]:
        """As it is kept beside a result: without what had no part in it."""
        return asdict(self) | ({"delta": None, "bound": None} if self.method == "crc" else {})


def _decide_with_confidence(table: NDArray, asked: _Asked) -> tuple[NDArray, NDArray, NDArray]:
    """Which columns pass `[K]`, their upper bounds and their p-values."""
    # A table may come sorted, by length or by source, and `betting` is not valid in an order that tells of losses.
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(table))
    losses, target = asked.to_unit(table[order]), asked.to_unit(asked.target)
    p_values = np.asarray(p_values_of(losses, target, bound=asked.bound, delta=asked.delta))
    upper_bounds = upper_bounds_of(losses, bound=asked.bound, delta=asked.delta)
    passed = p_values <= asked.delta if asked.method == "ltt" else upper_bounds <= target
    return passed, asked.from_unit(upper_bounds), p_values


def _decide_by_expectation(table: NDArray, asked: _Asked) -> tuple[NDArray, NDArray, None]:
    """Which columns pass `[K]`, what the target was compared with, and no p-values.

    The input to come counts as a row with the largest loss.
    """
    # The running maximum starts at what never exiting loses, since that is what the choice falls back to: with signed
    # losses the guarantee fails otherwise.
    monotone = np.maximum.accumulate(np.maximum(0.0, table), axis=1)
    upper_bounds = (monotone.sum(axis=0) + asked.loss_upper) / (len(table) + 1)
    return upper_bounds <= asked.target, upper_bounds, None


def _read_losses(losses: ArrayLike, asked: _Asked) -> NDArray:
    table = _read_numbers("losses", losses)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(
            f"`losses` must have the shape [inputs, candidates], got {list(table.shape)}: a row for each input, a "
            "column for each candidate."
        )
    asked.check_losses(table)
    return table


def _read_costs(costs: ArrayLike, *, columns: int) -> NDArray:
    prices = _read_numbers("costs", costs)
    if prices.shape != (columns,):
        raise ValueError(f"`costs` must have one for each of the {columns} columns, got shape {list(prices.shape)}.")
    return prices


def _read_numbers(name: str, values: ArrayLike) -> NDArray:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be an array of numbers, got {type(values).__name__}: {error}") from error
    if not np.isfinite(numbers).all():
        other = numbers[~np.isfinite(numbers)].flat[0]
        raise ValueError(f"`{name}` must be finite, got {other}: leave out the inputs that have no value, everywhere.")
    return numbers


def _check_name(argument: str, name: Any, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"`{argument}` must be one of {list(known)}, got {name!r}.")


def _check_between(argument: str, value: Any, low: float, high: float) -> None:
    if not _is_number(value) or not low < value < high:
        raise ValueError(f"`{argument}` must be a number above {low} and below {high}, got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
