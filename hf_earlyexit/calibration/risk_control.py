"""Statistics of choosing a threshold with a guarantee: `calibrate`, on a table of losses.

Independent of models and thresholds: a column is any setting whose losses were measured. Assumptions: rows are inputs,
drawn independently from the distribution of the inputs to come (tokens of one text are not); the candidates and their
order were fixed before any loss was seen; and the measured setup is the one that will run: decoding, batch rule,
length, dtype.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_earlyexit.calibration.bounds import BOUNDS, FROM_TOTALS, betting, p_values_of, upper_bounds_of
from hf_earlyexit.calibration.fixed_sequence import rejected


METHODS = ("ltt", "ucb", "crc")
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Calibration:
    """The result of `calibrate`, with its arguments.

    Attributes:
        index: The chosen column; None if no column is good enough: never exit.
        accepted: Number of columns that keep the guarantee.
        columns: The accepted columns: with one start, the first `accepted`. All of them keep the guarantee
            simultaneously, so any of them may be used in place of the chosen one.
        means: Mean loss of each column.
        upper_bounds: For each column separately: its risk is at most this with probability `1 - delta`. For `"crc"`,
            the value that the target is compared with, (n mean + loss_upper) / (n + 1), which bounds no single
            column's risk.
        p_values: For each column, of the hypothesis that its risk is above the target. None for `"crc"`.
        n: Number of inputs.
        target: Of the risk, in units of the losses.
        delta: Of the guarantee; None for `"crc"`, which has none.
        method: `"ltt"`, `"ucb"` or `"crc"`.
        bound: A name in `BOUNDS`; None for `"crc"`, which uses none.
        loss_lower: Lower limit of the losses.
        loss_upper: Upper limit of the losses.
        starts: Number of starts of the walk over the columns.
    """

    index: int | None
    accepted: int
    columns: tuple[int, ...]
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
    starts: int = 1


def calibrate(
    losses: ArrayLike,
    costs: ArrayLike,
    *,
    target: float,
    delta: float = 0.1,
    method: str = "ltt",
    bound: str = "wsr",
    loss_lower: float = 0.0,
    loss_upper: float = 1.0,
    starts: int = 1,
) -> Calibration:
    """Choose the cheapest column whose risk, the mean loss over inputs to come, is shown to be at most `target`.

    The walk goes over the columns from the first and ends before the first one that is not shown to be safe. Of the
    columns before it the cheapest is chosen, and of equally cheap ones the most conservative. CALM takes the last one
    instead, which is the same if costs descend.

    Args:
        losses: `[n, K]`, the loss of input i with candidate k, from the most conservative candidate to the most eager.
            A loss is measured against never exiting, whose own loss is 0. Signed losses are below 0 if exiting scores
            better.
        costs: `[K]`, of each candidate, such as layers per token. They may come from these same inputs and need not
            descend.
        target: The largest acceptable risk, between 0 and `loss_upper`.
        delta: The probability, over the draw of the calibration inputs, that the guarantee fails.
        method: `"ltt"` tests each column (Learn then Test with a fixed sequence, arXiv 2110.01052) and `"ucb"`
            compares an upper bound with the target (RCPS, arXiv 2101.02703). With probability `1 - delta` every
            accepted column has a risk of at most `target`, whether or not risks rise with eagerness. Here both use the
            same bound and agree; `"ucb"` is for users who prefer bounds to tests. `"crc"` (conformal risk control,
            arXiv 2208.02814) has a weaker guarantee: a loss of at most `target` in expectation over the calibration
            inputs and the one to come. `delta` and `bound` are not used. It needs losses that never fall with
            eagerness, starting from the 0 of never exiting. Each row is therefore replaced by its running maximum, at
            least 0; signed losses have no advantage there.
        bound: `"wsr"` (betting), `"hb"` (Hoeffding-Bentkus), `"hoeffding"`, `"clopper_pearson"` (exact, losses of 0
            and 1). Only `"hb"` and `"clopper_pearson"` need scipy: `pip install hf-earlyexit[calibrate]`.
        loss_lower: 0, or less for signed losses. They are rescaled to [0, 1]. `"wsr"` loses little by it. `"hb"` and
            `"hoeffding"` get weaker with the width of the range; with them losses clipped at 0 (CALM's) mostly do
            better.
        loss_upper: The largest possible loss, not the largest one measured.
        starts: With `"ltt"`, the number of columns at which the walk starts, spread evenly, each with its share of
            delta, which is passed on (see `fixed_sequence.rejected`). One is best if the order is right; with more,
            columns can be accepted after an early one fails.

    Raises:
        ValueError: An argument is not as described, or n is too small for the target even at zero loss.
        ImportError: The bound needs scipy.
    """
    asked = _Asked(target, delta, method, bound, loss_lower, loss_upper, starts)
    table = _read_losses(losses, asked)
    prices = _read_costs(costs, columns=table.shape[1])
    asked.check_enough(len(table))
    decide = _decide_by_expectation if method == "crc" else _decide_with_confidence
    passed, upper_bounds, p_values = decide(table, asked)
    columns = _accepted(passed, p_values, asked)
    return Calibration(
        index=min(columns, key=prices.__getitem__, default=None),
        accepted=len(columns),
        columns=columns,
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
    bound: str = "wsr",
    loss_lower: float = 0.0,
    loss_upper: float = 1.0,
    starts: int = 1,
) -> int:
    """The smallest number of inputs with which `calibrate`, with these arguments, accepts a column of zero losses.

    Columns with losses need more: if the mean loss is half the target, `"hb"` needs six times as many.

    Raises:
        ValueError: As `calibrate`.
    """
    return _Asked(target, delta, method, bound, loss_lower, loss_upper, starts).inputs_needed()


def are_enough(
    inputs: int,
    *,
    target: float,
    delta: float = 0.1,
    method: str = "ltt",
    bound: str = "wsr",
    loss_lower: float = 0.0,
    loss_upper: float = 1.0,
    starts: int = 1,
) -> bool:
    """Whether `calibrate`, with these arguments, accepts a column of that many inputs with zero losses.

    With signed losses and `"hb"`, which rounds, one input more than enough may be one too few.

    Raises:
        ValueError: As `calibrate`.
    """
    return _Asked(target, delta, method, bound, loss_lower, loss_upper, starts).is_enough(inputs)


def split_delta(delta: float, calibrations: int) -> float:
    """The delta for each of several calibrations on the same inputs, of which the best will be used.

    All their guarantees then hold simultaneously with probability `1 - delta` (union bound). There is no such split
    for `"crc"`: take new inputs after choosing.

    Raises:
        ValueError: `delta` is not between 0 and 1, or `calibrations` is not a number of at least 1.
    """
    _check_between("delta", delta, 0, 1)
    _check_count("calibrations", calibrations)
    return delta / calibrations


def _accepted(passed: NDArray, p_values: NDArray | None, asked: _Asked) -> tuple[int, ...]:
    """The columns that keep the guarantee simultaneously."""
    if asked.method == "ltt":
        return rejected(p_values.tolist(), asked.delta, asked.starts)
    return tuple(range(count_accepted(passed)))


def count_accepted(passed: NDArray) -> int:
    """The number of columns that pass before the first that does not."""
    return int(np.logical_and.accumulate(passed).sum())


@dataclass(frozen=True)
class _Asked:
    """The arguments of a calibration, checked, with conversions of losses to and from [0, 1]."""

    target: float
    delta: float
    method: str
    bound: str
    loss_lower: float
    loss_upper: float
    starts: int = 1

    def __post_init__(self):
        _check_name("method", self.method, METHODS)
        _check_count("starts", self.starts)
        if self.starts > 1 and self.method != "ltt":
            raise ValueError(f"`starts={self.starts}` goes with `method='ltt'`, which tests, not {self.method!r}.")
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
        """Whether n inputs with zero losses would be accepted."""
        if self.method == "crc":
            return self.loss_upper / (n + 1) <= self.target
        zero, target = self.to_unit(0.0), self.to_unit(self.target)
        if self.bound == "wsr":
            return bool(betting(np.full((n, 1), zero), target, self.level)[0] <= self.level)
        return bool(FROM_TOTALS[self.bound](n * zero, n, target) <= self.level)

    @property
    def level(self) -> float:
        """The level at which each start is tested."""
        return self.delta / self.starts

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
        """The arguments as stored with a result, with None for those that were not used."""
        return asdict(self) | ({"delta": None, "bound": None} if self.method == "crc" else {})


def _decide_with_confidence(table: NDArray, asked: _Asked) -> tuple[NDArray, NDArray, NDArray]:
    """Which columns pass `[K]`, their upper bounds and their p-values."""
    # Shuffled because a table may be sorted, by length or by source, and `betting` is not valid if the order of the
    # rows depends on their losses.
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(table))
    losses, target = asked.to_unit(table[order]), asked.to_unit(asked.target)
    p_values = np.asarray(p_values_of(losses, target, bound=asked.bound, delta=asked.level))
    upper_bounds = upper_bounds_of(losses, bound=asked.bound, delta=asked.delta)
    passed = p_values <= asked.delta if asked.method == "ltt" else upper_bounds <= target
    return passed, asked.from_unit(upper_bounds), p_values


def _decide_by_expectation(table: NDArray, asked: _Asked) -> tuple[NDArray, NDArray, None]:
    """Which columns pass `[K]`, the values compared with the target, and no p-values.

    The input to come counts as a row with the largest loss.
    """
    # The running maximum starts at 0, the loss of never exiting, which is the fallback. With signed losses the
    # guarantee fails otherwise.
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


def _check_count(argument: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{argument}` must be a whole number of at least 1, got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
