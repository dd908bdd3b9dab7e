"""Adaptive thresholds from two Beta distributions of confidence, one for right and one for wrong tokens.

Takes and returns plain numbers. Independent of models and certificates; only the candidate thresholds are known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from hf_earlyexit.common.values import is_number


CLIP = 1e-4  # densities are infinite or 0 at 0 and 1
LEAST_VARIANCE = 1e-8
ZETA = 0.4  # as in FREE
ROUNDING = 1e-9  # tolerance for rounding of means and posteriors, so that ties are decided reproducibly
LEAST_OF_A_KIND = 10  # minimum number of right and of wrong tokens before either distribution is fitted


@dataclass(frozen=True)
class Beta:
    """A Beta distribution, both shapes above 0."""

    alpha: float
    beta: float

    @classmethod
    def matched(cls, mean: float, variance: float) -> Beta | None:
        """The Beta distribution with these moments; None if there is none, or the variance is too small."""
        spread = mean * (1 - mean)
        if not LEAST_VARIANCE < variance < spread:
            return None
        strength = spread / variance - 1
        return cls(mean * strength, (1 - mean) * strength)

    def log_density(self, value: float) -> float:
        value = clipped(value)
        constant = math.lgamma(self.alpha + self.beta) - math.lgamma(self.alpha) - math.lgamma(self.beta)
        return constant + (self.alpha - 1) * math.log(value) + (self.beta - 1) * math.log1p(-value)


# Priors of FREE, used if too few tokens of a kind have been seen, or all with the same confidence.
RIGHT_AT_FIRST, WRONG_AT_FIRST = Beta(2.0, 1.0), Beta(1.0, 2.0)


@dataclass
class Moments:
    """Running mean and variance; the numbers are not stored (Welford's algorithm)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self.squares += step * (value - self.mean)

    @property
    def variance(self) -> float:
        return self.squares / self.count if self.count else 0.0


def clipped(value: float) -> float:
    """`value` clipped to [0.0001, 0.9999]."""
    return min(1 - CLIP, max(CLIP, value))


def posterior_right(confidence: float, right: Beta, wrong: Beta, share: float = 0.5) -> float:
    """The posterior probability that a token with this confidence is right.

    Args:
        right, wrong: The confidence distributions of right and of wrong tokens.
        share: The prior share of right tokens; 1/2 corresponds to FREE, which omits the prior.
    """
    if not 0 < share < 1:
        return share
    odds = right.log_density(confidence) - wrong.log_density(confidence) + math.log(share) - math.log1p(-share)
    return 1 / (1 + math.exp(-odds)) if odds > -700 else 0.0


class BetaMixture:
    """Chooses among candidate thresholds a small one at which the posterior that a token is right exceeds `zeta`.

    This is the adaptive threshold of FREE (arXiv 2310.05424). Confidences of tokens that ran to full depth are
    collected separately for tokens whose exit agreed with full depth and tokens whose exit did not. Each kind is
    modelled by a Beta distribution with the mean and variance of its confidences.

    **Validity of the certificate.** All `thresholds` of a certificate were shown to keep the target simultaneously
    (with probability 1 - delta over the draw of the calibration inputs). Given that, let the threshold of each unit
    (an input, or another unit that the certificate covers) be any function of the units before it. The new unit is
    independent of these, so its expected loss, given them, is the risk of that threshold, which is at most the target.
    So the expected mean loss over a number of units fixed beforehand is at most the target, too. Nothing is assumed
    about the Beta distributions: if they are wrong, as they are after few tokens, that costs time, or quality up to
    the target, never beyond it.
    The same holds for `"crc"`, which guarantees an expectation: each unit's loss is at most its running maximum up to
    the last accepted setting, and that maximum was bounded. The argument fails if the threshold changes *within* a
    unit, or depends on the text that it is used for.

    Differences from FREE and its released code:

    - FREE moves in steps of 0.067 between 0.3 and 0.9 and counts all grid points above zeta, so it can get stuck at
      the upper end. Here the search starts where right tokens usually lie and goes down through the candidates while
      the posterior is above zeta. So it does not skip a confidence at which tokens are wrong. If no candidate
      qualifies, the most conservative one is used.
    - FREE learns from exited tokens only when a later token runs deep; without confident tokens it learns nothing.
      Here exited tokens are never labelled, and tokens that did not exit are a biased sample, since their confidence
      was below the threshold. So learn from *audits*: at regular intervals, run one text at full depth with
      `record_exits=True`.
    - Sums are stored instead of tokens, and the number of fits is unlimited. Until `LEAST_OF_A_KIND` tokens of either
      kind have been seen, FREE's priors hold: Beta(2, 1) for right tokens, Beta(1, 2) for wrong ones.
    - All exits share one threshold, as everywhere in this package; FREE has one exit.

    Example, with a certified `model`, its `tokenizer` and `texts`:

        mixture = BetaMixture(model.exit_certificate.thresholds)
        for number, text in enumerate(texts):
            inputs, audit = tokenizer(text, return_tensors="pt"), number % 10 == 0
            threshold = None if audit else mixture.threshold()  # None: full depth, which loses nothing
            output = model.generate(
                **inputs, exit_threshold=threshold, record_exits=audit, return_dict_in_generate=True
            )
            if audit:
                mixture.observe(*labelled_confidences(output))

    `labelled_confidences` is in `hf_earlyexit.decoding.recorded_run`. Not thread-safe.

    Args:
        candidates: Thresholds in [0, 1] to choose from, such as a certificate's `thresholds`, which are those that
            were tested. To get many, calibrate one curve on a fine grid with `Search(order="threshold")`.
        zeta: The value between 0 and 1 that the posterior must exceed.
        weighted: Whether the posterior uses the observed share of right tokens as its prior; FREE's does not.

    Raises:
        ValueError: There is no candidate, or a value is out of range.
    """

    def __init__(self, candidates: Sequence[float], zeta: float = ZETA, *, weighted: bool = False):
        self.candidates = tuple(sorted(set(candidates)))
        if not self.candidates:
            raise ValueError(
                "`candidates` must have at least one threshold, got none: a certificate has `thresholds` only if it "
                "is certified."
            )
        for value in self.candidates:
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"`candidates` must be numbers in [0, 1], got {value!r}.")
        if not is_number(zeta) or not 0 < zeta < 1:
            raise ValueError(f"`zeta` must be a number between 0 and 1, got {zeta!r}.")
        self.zeta, self.weighted = zeta, weighted
        self._moments = {True: Moments(), False: Moments()}

    def observe(self, confidences: Iterable[float], agreed: Iterable[bool]) -> None:
        """Learn from tokens that ran to full depth.

        Args:
            confidences: Exit confidences in [0, 1].
            agreed: For each confidence, whether the exit's first choice was that of full depth.

        Raises:
            ValueError: The numbers of values differ, or a confidence is out of range.
        """
        confidences, agreed = list(map(float, confidences)), list(map(bool, agreed))
        if len(confidences) != len(agreed):
            raise ValueError(
                f"`confidences` are {len(confidences)} and `agreed` {len(agreed)}: give one for each of the other."
            )
        for value in confidences:
            if not 0 <= value <= 1:
                raise ValueError(f"`confidences` must be numbers in [0, 1], got {value!r}.")
        for value, right in zip(confidences, agreed, strict=True):
            self._moments[right].add(clipped(value))

    def threshold(self) -> float:
        """The chosen candidate; it changes only with `observe`.

        The search starts at the smallest candidate not below the mean confidence of right tokens, or at the most
        conservative candidate if all are below. It goes down while the posterior is above `zeta`. If the posterior is
        not above `zeta` at the start, the result is the most conservative candidate.
        """
        usual = self.right.alpha / (self.right.alpha + self.right.beta)
        start = next((value for value in self.candidates if value >= usual - ROUNDING), self.candidates[-1])
        down = [value for value in reversed(self.candidates) if value <= start]
        found = list(takewhile(lambda value: self.posterior(value) > self.zeta + ROUNDING, down))
        return found[-1] if found else self.candidates[-1]

    def posterior(self, confidence: float) -> float:
        """The posterior probability that a token with this confidence is right."""
        share = self._counts[0] / sum(self._counts) if self.weighted and self._knows_enough else 0.5
        return posterior_right(confidence, self.right, self.wrong, share)

    @property
    def right(self) -> Beta:
        """The confidence distribution of right tokens."""
        return self._fitted(True) or RIGHT_AT_FIRST

    @property
    def wrong(self) -> Beta:
        """The confidence distribution of wrong tokens."""
        return self._fitted(False) or WRONG_AT_FIRST

    @property
    def _counts(self) -> list[int]:
        """The numbers of right and of wrong tokens observed."""
        return [self._moments[kind].count for kind in (True, False)]

    @property
    def _knows_enough(self) -> bool:
        return min(self._counts) >= LEAST_OF_A_KIND

    def _fitted(self, kind: bool) -> Beta | None:
        if not self._knows_enough:
            return None
        return Beta.matched(self._moments[kind].mean, self._moments[kind].variance)
