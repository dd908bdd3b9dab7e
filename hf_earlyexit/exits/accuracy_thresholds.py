"""Per-exit thresholds controlled by one number, the target accuracy of every exit.

A table per exit maps a confidence to the share of tokens with at least that confidence that agreed with full depth.
Confidences and agreement are measured in `calibration/accuracy_fit.py`.
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

from hf_earlyexit.common.seen_inputs import FITTED_ON
from hf_earlyexit.common.transfer import to_host
from hf_earlyexit.common.values import is_integer, is_number
from hf_earlyexit.exits.criteria import CRITERIA, ExitCriterion, ExitPoint
from hf_earlyexit.exits.separating import separating_thresholds


NAME = "accuracy"
WRAPPED = tuple(name for name in CRITERIA if name != "fixed")  # `"fixed"` has no graded confidence
LEAST_TOKENS, LEVELS = 50, 100


@dataclass(frozen=True)
class AccuracyTable:
    """Agreement with full depth at one exit, as a step function of confidence.

    Attributes:
        layer: Number of layers run at the exit.
        confidences: Ascending. Fitted ones lie between observed confidences, so that rounding cannot change an exit.
        shares: Ascending. `shares[i]` is the share of tokens with confidence at least `confidences[i]` whose first
            choice was that of full depth, or the share for a lower confidence if that is larger.

    Raises:
        ValueError: A value is out of range, not ascending, or missing.
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
        """The share for a token with this confidence; 0 below the first confidence of the table."""
        place = bisect_right(self.confidences, confidence)
        return self.shares[place - 1] if place else 0.0

    def threshold(self, target: float) -> float | None:
        """The smallest confidence with a share of at least `target`; None if there is none."""
        if target <= 0:
            return 0.0
        place = bisect_left(self.shares, target)
        return self.confidences[place] if place < len(self.shares) else None


@dataclass(frozen=True)
class ExitAccuracy:
    """A criterion whose confidence is the measured accuracy of an exit.

    The confidence of a token is the share of tokens, among those at least as confident at the same exit, that agreed
    with full depth on the inputs that the tables were fitted on. Based on the self-supervised early exits of arXiv
    2407.21082.

    In that paper every exit has its own threshold, the smallest at which the exiting tokens agree with the last layer
    at a rate of at least 1 - epsilon. Here the tables reduce these thresholds to one number: with threshold `target`,
    a token exits exactly where its confidence is at least the exit's own threshold for that target
    (`thresholds_for`). One number can be varied from conservative to eager, scheduled and certified, while a grid with
    one threshold per exit would need many more tests.

    There are two differences from the paper. Any criterion can be wrapped, not only top-1 minus top-2 (or, in a later
    version, entropy). And the texts are those that full depth generated, teacher-forced. A rate is an observed value
    without a margin, on tokens that depend on each other within a text. It orders settings but guarantees nothing; a
    guarantee needs a certificate, on inputs that the tables were not fitted on.

    Attributes:
        criterion: The wrapped criterion: a name in `CRITERIA` other than `"fixed"`, or an object. With an object it
            cannot be stored.
        tables: One table for each exit that may be evaluated, ascending by layer.
        fitted_on: Hashes of the inputs (`data.hash_of_input`) that the tables were fitted on, on which no guarantee
            can be tested; empty if unknown.

    Raises:
        ValueError: The criterion is unknown, or the tables are empty, repeat a layer or are not in order.
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
        """The layers of the exits that have a table."""
        return [table.layer for table in self.tables]

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        """`[rows]`, fp64 on the CPU, since the wrapped confidences are read from the device here."""
        table = self._by_layer[point.layer]
        sure = to_host(self._asked.confidence(point))
        return torch.tensor([table.share(confidence) for confidence in sure], dtype=torch.float64)

    def thresholds_for(self, target: float) -> dict[int, float | None]:
        """For each exit, the wrapped criterion's minimum confidence to exit there; None: no token exits there."""
        return {table.layer: table.threshold(target) for table in self.tables}

    def check_exit_points(self, layers: list[int]) -> None:
        """Check that every exit point has a table.

        Raises:
            ValueError: A layer has no table, or the criterion is patience and the exit points are not the fitted ones.
        """
        if self.criterion == "patience" and layers != self.layers:  # its confidence depends on the other exits used
            raise ValueError(
                f"`exit_criterion` has accuracies of patience fitted for exit points {self.layers}, but the call "
                f"evaluates {layers}: pass `exit_layers={self.layers}`, or fit it for these."
            )
        if foreign := sorted(set(layers) - set(self.layers)):
            raise ValueError(
                f"`exit_criterion` has accuracies for the exits {self.layers}, but none for {foreign}, which the "
                f"call evaluates: pass `exit_layers={self.layers}`, or fit it for more."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-compatible values, accepted as `exit_criterion`.

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
        """The criterion from the values of `to_dict`.

        Raises:
            ValueError: The values are not of that form; the message says which.
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
    """Fit tables to recorded confidences and agreement.

    Args:
        criterion: The criterion that the confidences are from.
        confidences: By exit layer, `[tokens]`, in [0, 1].
        agrees: By exit layer, `[tokens]`, whether the exit's first choice is that of full depth.
        least_tokens: Shares of fewer tokens are ignored, so that a few lucky tokens do not make a threshold.
        levels: Shares are rounded down to multiples of 1 / `levels`, so that tables stay short; None: no rounding. A
            target between two levels gets the threshold of the upper level.

    Raises:
        ValueError: An argument is malformed or out of range, or an exit has fewer than `least_tokens` tokens.
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
    """The table of all increases of the share, from the smallest confidence on, midway between two confidences."""
    order = np.argsort(sure)
    sure, right = sure[order], right[order]
    first, thresholds = separating_thresholds(sure)  # tokens with equal confidence exit together
    counts = len(sure) - first
    rates = right[::-1].cumsum()[::-1][first] / counts
    shares = np.maximum.accumulate(rates[counts >= least_tokens])
    if levels is not None:
        shares = np.floor(shares * levels + 1e-9) / levels
    steps = np.flatnonzero(np.diff(shares, prepend=0.0))
    return AccuracyTable(layer, tuple(thresholds[steps].tolist()), tuple(shares[steps].tolist()))
