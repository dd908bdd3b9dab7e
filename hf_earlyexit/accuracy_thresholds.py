"""Answers for a threshold of its own at every exit, all named by one number: the accuracy that is asked of each.

A table per exit says what share of the tokens that were at least so sure agreed with full depth; how confidences and
agreement are come by is not known here (`accuracy_fit.py`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from hf_earlyexit.config import is_integer, is_number
from hf_earlyexit.policies import CRITERIA, ExitCriterion, ExitPoint
from hf_earlyexit.seen_inputs import FITTED_ON
from hf_earlyexit.separating import separating_thresholds
from hf_earlyexit.transfer import to_host


NAME = "accuracy"
WRAPPED = tuple(name for name in CRITERIA if name != "fixed")  # which has no confidence to speak of
LEAST_TOKENS, LEVELS = 50, 100


@dataclass(frozen=True)
class AccuracyTable:
    """Of one exit: from which confidence on which share agrees.

    Attributes:
        layer: Layers run where it is asked.
        confidences: Ascending. Fitted ones lie between those that were observed, so that rounding decides nothing.
        shares: Ascending: of the tokens at least as sure as the confidence at the same place, the share whose first
            choice was full depth's; or of those at least as sure as one before it, where that is more.

    Raises:
        ValueError: These are no such numbers.
    """

    layer: int
    confidences: tuple[float, ...]
    shares: tuple[float, ...]

    def __post_init__(self):
        if not is_integer(self.layer) or self.layer < 1:
            raise ValueError(f"`layer` of a table must be a whole number from 1 on, got {self.layer!r}.")
        for name in ("confidences", "shares"):
            values = getattr(self, name)
            if not all(is_number(value) and 0 <= value <= 1 for value in values):
                raise ValueError(f"`{name}` of layer {self.layer} must be numbers in [0, 1], got {list(values)!r}.")
            if not all(one < other for one, other in pairwise(values)):
                raise ValueError(f"`{name}` of layer {self.layer} must ascend, got {list(values)!r}.")
        if len(self.confidences) != len(self.shares):
            raise ValueError(
                f"Layer {self.layer} has {len(self.confidences)} `confidences` and {len(self.shares)} `shares`: "
                "give a share for each confidence."
            )

    def share(self, confidence: float) -> float:
        """What a token that is so sure is said to be right with; 0 below the whole table."""
        place = bisect_right(self.confidences, confidence)
        return self.shares[place - 1] if place else 0.0

    def threshold(self, target: float) -> float | None:
        """The smallest confidence with at least this share; None: there is none."""
        if target <= 0:
            return 0.0
        place = bisect_left(self.shares, target)
        return self.confidences[place] if place < len(self.shares) else None


@dataclass(frozen=True)
class ExitAccuracy:
    """The share of tokens, among those at least this sure at this exit, that agreed with full depth where the tables
    were fitted (after the self-supervised early exits of arXiv 2407.21082).

    There every exit has a threshold of its own, the smallest at which the tokens that leave agree with the last layer
    with a rate of at least 1 - epsilon. Here the tables make all of them one number: at threshold `target` a token
    leaves exactly where its confidence is at least the exit's own threshold for that target (`thresholds_for`). One
    number can be walked from conservative to eager, scheduled and certified, where a grid of one threshold per exit
    would have to be paid for in tests.

    It departs from the source in that any criterion can be wrapped, not top-1 minus top-2 (or, later, entropy) alone,
    and in that texts are full depth's own, teacher-forced. A rate is what was seen, without a margin, on tokens of one
    text that depend on each other: it orders settings, and promises nothing. That is the certificate's, on inputs that
    the tables were not fitted on.

    Attributes:
        criterion: How sure a token is: a name in `CRITERIA` but `"fixed"`, or an object, with which it cannot be
            stored.
        tables: One for each exit that may be asked, ascending.
        fitted_on: Hashes of the inputs (`data.hash_of_input`) that the tables were fitted on, which no promise can be
            tested on; none where that is not known.

    Raises:
        ValueError: The criterion is unknown, or the tables are none, of one layer twice or not in order.
    """

    criterion: str | ExitCriterion
    tables: tuple[AccuracyTable, ...]
    fitted_on: tuple[str, ...] = ()

    def __post_init__(self):
        if isinstance(self.criterion, str) and self.criterion not in WRAPPED:
            raise ValueError(f"`criterion` must be one of {list(WRAPPED)} or an object, got {self.criterion!r}.")
        layers = self.layers
        if not layers or layers != sorted(set(layers)):
            raise ValueError(f"`tables` must be of different layers, ascending, got layers {layers}.")

    @property
    def layers(self) -> list[int]:
        """The exits that have a table."""
        return [table.layer for table in self.tables]

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        """In fp64 and on the CPU: what was to be read of the device has been read."""
        table = self._by_layer[point.layer]
        sure = to_host(self._asked.confidence(point))
        return torch.tensor([table.share(confidence) for confidence in sure], dtype=torch.float64)

    def thresholds_for(self, target: float) -> dict[int, float | None]:
        """Of each exit the wrapped criterion's confidence from which a token leaves; None: none leaves there."""
        return {table.layer: table.threshold(target) for table in self.tables}

    def check_exit_points(self, layers: list[int]) -> None:
        """Refuse to be asked where nothing was fitted.

        Raises:
            ValueError: A layer has no table.
        """
        if self.criterion == "patience" and layers != self.layers:  # whose confidence depends on who else was asked
            raise ValueError(
                f"`exit_criterion` has accuracies of patience asked at {self.layers}, and would be asked at {layers}: "
                f"pass `exit_layers={self.layers}`, or fit it for these."
            )
        if foreign := sorted(set(layers) - set(self.layers)):
            raise ValueError(
                f"`exit_criterion` has accuracies for the exits {self.layers}, and would be asked at {foreign}, too: "
                f"pass `exit_layers={self.layers}`, or fit it for more."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `exit_criterion` takes them and JSON keeps them.

        Raises:
            ValueError: The wrapped criterion is an object.
        """
        if not isinstance(self.criterion, str):
            raise ValueError(
                f"`criterion` is an object, {self.criterion!r}, which cannot be stored: wrap one of {list(WRAPPED)}."
            )
        tables = [
            {"layer": one.layer, "confidences": list(one.confidences), "shares": list(one.shares)}
            for one in self.tables
        ]
        seen = {FITTED_ON: list(self.fitted_on)} if self.fitted_on else {}
        return {"name": NAME, "criterion": self.criterion, "tables": tables, **seen}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExitAccuracy:
        """What `to_dict` gave.

        Raises:
            ValueError: It is something else; the message says what.
        """
        if set(values) - {FITTED_ON} != {"name", "criterion", "tables"} or values["name"] != NAME:
            raise ValueError(
                f'`exit_criterion` of plain values must be those of an `ExitAccuracy`: {{"name": {NAME!r}, '
                f'"criterion": ..., "tables": ...}}, got {sorted(values)} with the name {values.get("name")!r}.'
            )
        if values["criterion"] not in WRAPPED:
            raise ValueError(f"`criterion` must be one of {list(WRAPPED)}, got {values['criterion']!r}.")
        seen = values.get(FITTED_ON, ())
        if not isinstance(seen, list | tuple) or not all(isinstance(one, str) for one in seen):
            raise ValueError(f"`{FITTED_ON}` of `exit_criterion` must be a list of hashes, got {seen!r}.")
        if not isinstance(values["tables"], list | tuple):
            raise ValueError(f"`tables` of `exit_criterion` must be a list, got {values['tables']!r}.")
        keys = {"layer", "confidences", "shares"}
        for one in values["tables"]:
            if not isinstance(one, Mapping) or set(one) != keys:
                raise ValueError(f"`tables` of `exit_criterion` must be objects with {sorted(keys)}, got {one!r}.")
            if not all(isinstance(one[name], list | tuple) for name in ("confidences", "shares")):
                raise ValueError(f"`confidences` and `shares` of a table must be lists, got {one!r}.")
        tables = (
            AccuracyTable(one["layer"], tuple(one["confidences"]), tuple(one["shares"])) for one in values["tables"]
        )
        return cls(values["criterion"], tuple(tables), tuple(seen))

    @cached_property
    def _by_layer(self) -> dict[int, AccuracyTable]:
        return {table.layer: table for table in self.tables}

    @cached_property
    def _asked(self) -> ExitCriterion:
        return CRITERIA[self.criterion]() if isinstance(self.criterion, str) else self.criterion


def fit_accuracy(
    criterion: str | ExitCriterion,
    confidences: Mapping[int, ArrayLike],
    agrees: Mapping[int, ArrayLike],
    *,
    least_tokens: int = LEAST_TOKENS,
    levels: int | None = LEVELS,
) -> ExitAccuracy:
    """Tables of what was recorded.

    Args:
        criterion: Whose confidences these are.
        confidences: By exit layer, `[tokens]`, in [0, 1].
        agrees: By exit layer, `[tokens]`, whether the exit's first choice is full depth's.
        least_tokens: A share of fewer tokens than these is not believed, so that one lucky token makes no threshold.
        levels: Shares are rounded down to so many parts of 1, so that tables stay short; None: as they are. A target
            between two levels gets the threshold of the one above it.

    Raises:
        ValueError: Something is not as said, or an exit has fewer than `least_tokens`.
    """
    if set(confidences) != set(agrees):
        raise ValueError(f"`confidences` has layers {sorted(confidences)} and `agrees` {sorted(agrees)}: give both.")
    for name, value in (("least_tokens", least_tokens), ("levels", levels)):
        if not (name == "levels" and value is None) and (not is_integer(value) or value < 1):
            raise ValueError(f"`{name}` must be a whole number from 1 on, got {value!r}.")
    tables = [
        _table(layer, *_checked(layer, confidences[layer], agrees[layer], least_tokens), least_tokens, levels)
        for layer in sorted(confidences)
    ]
    return ExitAccuracy(criterion, tuple(tables))


def _checked(layer: int, confidences: ArrayLike, agrees: ArrayLike, least_tokens: int) -> tuple[NDArray, NDArray]:
    sure, right = np.asarray(confidences, dtype=np.float64), np.asarray(agrees, dtype=np.float64)
    if sure.ndim != 1 or sure.shape != right.shape:
        raise ValueError(
            f"`confidences` and `agrees` of layer {layer} must be of the same tokens, got shapes {list(sure.shape)} "
            f"and {list(right.shape)}."
        )
    if len(sure) < least_tokens:
        raise ValueError(
            f"Layer {layer} has {len(sure)} tokens, fewer than `least_tokens={least_tokens}`: give more texts."
        )
    if not ((sure >= 0) & (sure <= 1)).all():
        raise ValueError(f"`confidences` of layer {layer} must be in [0, 1], got {sure.min()} to {sure.max()}.")
    if not ((right == 0) | (right == 1)).all():
        raise ValueError(f"`agrees` of layer {layer} must be true or false, got {right.min()} to {right.max()}.")
    return sure, right


def _table(layer: int, sure: NDArray, right: NDArray, least_tokens: int, levels: int | None) -> AccuracyTable:
    """Every step up of the share, from the smallest confidence on, each midway between two confidences."""
    order = np.argsort(sure)
    sure, right = sure[order], right[order]
    first, thresholds = separating_thresholds(sure)  # equally sure tokens leave together
    counts = len(sure) - first
    rates = right[::-1].cumsum()[::-1][first] / counts
    shares = np.maximum.accumulate(rates[counts >= least_tokens])
    if levels is not None:
        shares = np.floor(shares * levels + 1e-9) / levels
    steps = np.flatnonzero(np.diff(shares, prepend=0.0))
    return AccuracyTable(layer, tuple(thresholds[steps].tolist()), tuple(shares[steps].tolist()))
