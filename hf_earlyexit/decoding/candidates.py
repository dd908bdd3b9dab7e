"""Candidate settings for comparison: curves of a criterion over thresholds, and baselines.

A curve is named by its criterion, followed by the exit points if it uses only some of them: `softmax:2,4,6`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.exits.config import EarlyExitConfig
from hf_earlyexit.exits.criteria import WITH_CANDIDATES


FULL_DEPTH, STATIC = "full depth", "static decoder"
CURVES: dict[str, tuple[float, ...]] = {
    "softmax": (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
    "state": (0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9),
    "classifier": (0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.3),
}


@dataclass(frozen=True)
class Candidate:
    """A setting to be compared: its name in the tables, and the exit keywords of `generate`.

    Attributes:
        curve: The curve it is a point of.
        threshold: The threshold; None if the curve has only one point. For a static decoder, its depth.
        keywords: Keywords of `generate`.
    """

    curve: str
    threshold: float | None = None
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.curve if self.threshold is None else f"{self.curve} {self.threshold:g}"


def full_depth() -> Candidate:
    """Every token runs all layers: the reference for the others, and the fallback if none is good enough."""
    return Candidate(FULL_DEPTH, None, {"early_exit": False})


def static_decoders(exit_layers: Sequence[int]) -> list[Candidate]:
    """For each exit point, the setting with which every token exits there."""
    return [Candidate(STATIC, layer, {"exit_criterion": "fixed", "exit_layer": layer}) for layer in exit_layers]


def curve_candidates(
    curve: str, thresholds: Sequence[float], criteria: Mapping[str, dict[str, Any]] | None = None, **keywords: Any
) -> list[Candidate]:
    """The points of a curve from the most conservative to the most eager.

    Args:
        curve: `softmax`, or `softmax:2,4` to use only some exit points.
        thresholds: In any order. They must differ in their first six digits, which are in the names.
        criteria: Additional criteria by name, as plain values (see `ExitAccuracy.to_dict`); `curve` may name one.
        keywords: Further exit settings of all points, such as `exit_schedule` and `batch_exit`. `exit_candidates` is
            dropped for criteria without candidates.

    Raises:
        ValueError: The exit points of the curve are not integers, there is no threshold, or two thresholds have the
            same name.
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
    """Check every candidate against the exit configuration of the model.

    Raises:
        ValueError: A candidate is not legal, or the model lacks what it needs.
    """
    for candidate in candidates:
        ExitSettings.merge(candidate.keywords, None, None).check_against(built, num_layers, vocabulary)


def default_curves(built: EarlyExitConfig) -> Mapping[str, Sequence[float]]:
    """`CURVES`, without the classifier curve if the model has no trained classifiers."""
    classifies = built.classifier is not None and built.classifier.trained
    return {name: thresholds for name, thresholds in CURVES.items() if name != "classifier" or classifies}
