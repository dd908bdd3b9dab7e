"""Losses of an early-exit text, input by input: against full depth's text, or against references.

A loss maps the two texts of one input to one number, which is 0 if they are equal. The risk is the mean of per-input
losses, as the guarantee requires. Corpus BLEU is therefore not available; sentence BLEU is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import evaluate
import numpy as np

from hf_earlyexit.common.extras import require
from hf_earlyexit.evaluation.generate_texts import Text
from hf_earlyexit.evaluation.metrics import exact_match, rouge_scores, textual_consistency


ROUNDING = 1e-6  # tolerance for a score outside its range


class Loss(Protocol):
    """The loss of one input.

    Attributes:
        name: Short, for tables and files.
        description: The quantity that is averaged, phrased to follow "the mean".
        lower: Lower limit of the loss; below 0 if early exit may score better than full depth.
        upper: Upper limit of the loss.
        needs_references: Whether the inputs must have references.
        binary: Whether the loss is 0 or 1 for every input.
    """

    name: str
    description: str
    lower: float
    upper: float
    needs_references: bool
    binary: bool

    def of(self, early: Text, full: Text, references: Sequence[str]) -> float:
        """The loss of one input, in [lower, upper]."""
        ...


@dataclass(frozen=True)
class Inconsistency:
    """Distance between the early text and full depth's (CALM's textual consistency, arXiv 2207.07061, section 4).

    It needs no references. It counts every difference as a loss, including one that improves the text.
    """

    name: str
    description: str
    distance: Callable[[Text, Text], float]
    lower: float = 0.0
    upper: float = 1.0
    needs_references: bool = False
    binary: bool = False

    def of(self, early: Text, full: Text, references: Sequence[str]) -> float:
        return self.distance(early, full)


@dataclass(frozen=True)
class Drop:
    """Drop of a score from full depth's text to the early one (CALM's risk consistency).

    CALM clips at 0, so inputs on which early exit scores better count as 0. Here they count as negative losses, which
    the bounds allow ("Fast yet Safe", arXiv 2405.20915). `clipped=True` gives CALM's loss.
    """

    name: str
    description: str
    score: Callable[[str, Sequence[str]], float]
    clipped: bool = False
    upper: float = 1.0
    needs_references: bool = True
    binary: bool = False

    @property
    def lower(self) -> float:
        return 0.0 if self.clipped else -self.upper

    def of(self, early: Text, full: Text, references: Sequence[str]) -> float:
        drop = self.score(full.text, references) - self.score(early.text, references)
        return max(0.0, drop) if self.clipped else drop


def token_mismatch(early: Text, full: Text) -> float:
    """The share of positions with different tokens, over the longer text's length; a missing token is different."""
    length = max(len(early.tokens), len(full.tokens))
    equal = sum(one == other for one, other in zip(early.tokens, full.tokens, strict=False))
    return 1 - equal / length if length else 0.0


def text_distance(early: Text, full: Text) -> float:
    """1 - ROUGE-L F-measure."""
    return 1 - textual_consistency(early.text, full.text)


def text_mismatch(early: Text, full: Text) -> float:
    """1 if the texts differ, else 0."""
    return 1 - exact_match(early.text, full.text)


def sentence_bleu(prediction: str, references: Sequence[str]) -> float:
    """Sentence BLEU in [0, 1] (sacreBLEU: effective order, exponential smoothing)."""
    score = require("sacrebleu", "metrics").sentence_bleu(prediction, list(references)).score / 100
    return min(1.0, score)  # equal texts have 1.0000000000000004


def drop_of_metric(
    metric: evaluate.EvaluationModule, key: str, *, scale: float = 1.0, clipped: bool = False, **options
) -> Drop:
    """The drop of any metric of the `evaluate` library, computed for each input separately.

    Args:
        metric: A loaded metric or one of `hf_earlyexit.evaluation.metrics`. Higher must be better, and the score of a
            single input must be meaningful. It receives all references of the input.
        key: The name of the score in the metric's result; its value is a number, or a list with one number.
        scale: The largest possible score, 100 for some metrics. Scores are divided by it and must be at least 0.
        clipped: As in `Drop`.
        options: Keywords of `metric.compute`.

    Raises:
        ValueError: On first use, if there is no such key or a score is not within [0, scale].
    """
    score = partial(_metric_score, metric=metric, key=key, scale=scale, options=options)
    return Drop(f"{key}_drop", f"drop of {key} ({metric.name})", score, clipped)


def _metric_score(prediction: str, references: Sequence[str], *, metric, key: str, scale: float, options) -> float:
    found = metric.compute(predictions=[prediction], references=[list(references)], **options)
    if key not in found:
        raise ValueError(f"`key={key!r}` is not among the scores of {metric.name}: {sorted(found)}.")
    score = float(np.mean(found[key])) / scale
    if not -ROUNDING <= score <= 1 + ROUNDING:
        raise ValueError(f"`scale={scale}` does not fit {metric.name}: {key} is {found[key]}, not in [0, {scale}].")
    return min(1.0, max(0.0, score))


def _rouge(name: str) -> Drop:
    score = lambda prediction, references: rouge_scores(prediction, references)[name]  # noqa: E731
    label = name.replace("rouge", "ROUGE-")
    return Drop(f"{name}_drop", f"drop of {label} (best of the references)", score)


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Inconsistency("text_distance", "distance from full depth's text (1 - ROUGE-L)", text_distance),
        Inconsistency("token_mismatch", "share of tokens that are not full depth's", token_mismatch),
        Inconsistency("text_mismatch", "share of texts that are not full depth's", text_mismatch, binary=True),
        _rouge("rouge1"),
        _rouge("rouge2"),
        _rouge("rougeL"),
        Drop("bleu_drop", "drop of sentence BLEU (all references)", sentence_bleu),
        Drop("exact_match_drop", "drop of exact matches with a reference", exact_match),
    )
}
