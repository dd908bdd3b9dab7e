"""Answers for the ways to generate that are tried and compared: curves of a criterion over thresholds, and baselines.

A curve is the name of a criterion, and where it asks at some exit points only, these: `softmax:2,4,6`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from hf_earlyexit.config import EarlyExitConfig
from hf_earlyexit.policies import WITH_CANDIDATES
from hf_earlyexit.settings import ExitSettings


FULL_DEPTH, STATIC = "full depth", "static decoder"
CURVES: dict[str, tuple[float, ...]] = {
    "softmax": (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
    "state": (0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9),
    "classifier": (0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.3),
}


@dataclass(frozen=True)
class Candidate:
    """A way to generate: its place in the tables, and the exit keywords of `generate`.

    Attributes:
        curve: What it is a point of.
        threshold: Where on the curve; None where there is one point only. Of the static decoder its depth.
        keywords: Of `generate`.
    """

    curve: str
    threshold: float | None = None
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.curve if self.threshold is None else f"{self.curve} {self.threshold:g}"


def full_depth() -> Candidate:
    """Every token runs all layers: what others are measured against, and what is left when none is good enough."""
    return Candidate(FULL_DEPTH, None, {"early_exit": False})


def static_decoders(exit_layers: Sequence[int]) -> list[Candidate]:
    """Every token leaves after a layer, for each exit point."""
    return [Candidate(STATIC, layer, {"exit_criterion": "fixed", "exit_layer": layer}) for layer in exit_layers]


def curve_candidates(
    curve: str, thresholds: Sequence[float], criteria: Mapping[str, dict[str, Any]] | None = None, **keywords: Any
) -> list[Candidate]:
    """The points of a curve from the most conservative to the most eager.

    Args:
        curve: `softmax`, or `softmax:2,4` for some exit points only.
        thresholds: In whatever order. They must differ in their first six digits, which are in the names.
        criteria: Names for criteria of plain values (see `ExitAccuracy.to_dict`), which curves may then be of.
        keywords: Further exit settings of all of them, such as `exit_schedule` and `batch_exit`; `exit_candidates` is
            for the criteria that have candidates and left out elsewhere.

    Raises:
        ValueError: The exit points of the curve are no whole numbers, there is no threshold, or two have one name.
    """
    criterion, _, layers = curve.partition(":")
    if not thresholds:
        raise ValueError(f"The curve {curve!r} has no threshold: name at least one.")
    try:
        asked = {"exit_layers": [int(layer) for layer in layers.split(",")]} if layers else {}
    except ValueError as error:
        raise ValueError(f"The curve {curve!r} must be a criterion, or one and exit points: softmax:2,4,6.") from error
    if criterion not in WITH_CANDIDATES:
        keywords.pop("exit_candidates", None)
    settings = {"exit_criterion": (criteria or {}).get(criterion, criterion), **asked, **keywords}
    found = [
        Candidate(curve, threshold, {**settings, "exit_threshold": threshold})
        for threshold in sorted(set(thresholds), reverse=True)
    ]
    for one, other in pairwise(found):
        if one.name == other.name:
            raise ValueError(
                f"The thresholds {one.threshold!r} and {other.threshold!r} of the curve {curve!r} are both written "
                f"{one.threshold:g}: leave one of them out."
            )
    return found


def check_candidates(
    candidates: Sequence[Candidate], built: EarlyExitConfig, num_layers: int, vocabulary: int | None = None
) -> None:
    """Check every candidate against what is built into the model.

    Raises:
        ValueError: One is not legal, or the model lacks what it needs.
    """
    for candidate in candidates:
        ExitSettings.merge(candidate.keywords, None, None).check_against(built, num_layers, vocabulary)


def default_curves(built: EarlyExitConfig) -> Mapping[str, Sequence[float]]:
    """`CURVES`, the classifier's only where the model has trained ones."""
    classifies = built.classifier is not None and built.classifier.trained
    return {name: thresholds for name, thresholds in CURVES.items() if name != "classifier" or classifies}
