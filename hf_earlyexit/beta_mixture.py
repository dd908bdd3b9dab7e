"""Answers for a threshold that follows the texts: two Beta distributions of confidence, of tokens right and wrong.

Plain numbers in and out: it knows neither model nor certificate, only the thresholds that it may choose among.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from hf_earlyexit.config import is_number


CLIP = 1e-4  # densities are infinite or 0 at the ends
LEAST_VARIANCE = 1e-8
ZETA = 0.4  # FREE's
ROUNDING = 1e-9  # what a mean or posterior may be off by, so that a candidate that equals one is not left to it
LEAST_OF_A_KIND = 10  # tokens that were right, and that were wrong, before either is fitted


@dataclass(frozen=True)
class Beta:
    """A Beta distribution, both shapes above 0."""

    alpha: float
    beta: float

    @classmethod
    def matched(cls, mean: float, variance: float) -> Beta | None:
        """The one with these moments; None: there is none, or as good as none."""
        spread = mean * (1 - mean)
        if not LEAST_VARIANCE < variance < spread:
            return None
        strength = spread / variance - 1
        return cls(mean * strength, (1 - mean) * strength)

    def log_density(self, value: float) -> float:
        value = clipped(value)
        constant = math.lgamma(self.alpha + self.beta) - math.lgamma(self.alpha) - math.lgamma(self.beta)
        return constant + (self.alpha - 1) * math.log(value) + (self.beta - 1) * math.log1p(-value)


# Where a kind of token has not been seen yet, or always with one confidence; FREE's first guesses.
RIGHT_AT_FIRST, WRONG_AT_FIRST = Beta(2.0, 1.0), Beta(1.0, 2.0)


@dataclass
class Moments:
    """Mean and variance of numbers that are forgotten (Welford's sums)."""

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
    """Within [0.0001, 0.9999]."""
    return min(1 - CLIP, max(CLIP, value))


def posterior_right(confidence: float, right: Beta, wrong: Beta, share: float = 0.5) -> float:
    """The probability that a token which is so sure is right.

    Args:
        right, wrong: The confidences of tokens that are.
        share: Of tokens that are right, before their confidence is known; 1/2 is FREE's, which leaves it out.
    """
    if not 0 < share < 1:
        return share
    odds = right.log_density(confidence) - wrong.log_density(confidence) + math.log(share) - math.log1p(-share)
    return 1 / (1 + math.exp(-odds)) if odds > -700 else 0.0


class BetaMixture:
    """Chooses, of some thresholds, a small one at which a token is right with a posterior above `zeta` (the adaptive
    threshold of FREE, arXiv 2310.05424).

    The confidences of tokens that ran to full depth are collected, apart for those whose exit had agreed and those
    whose had not; either kind is taken for a Beta distribution with their mean and variance.

    **Kept within what was certified.** A certificate's `thresholds` were all shown to keep the target, all at once
    (with probability 1 - delta over the draw of the calibration inputs). Given that, let the threshold of each unit
    (an input, or what else the certificate is of) be any function of the units before it. The new unit is independent
    of these, so its expected loss, given them, is the risk of that threshold, which is at most the target; hence so is
    the expected mean over a number of units fixed beforehand. Nothing is assumed of the Betas: if they are wrong, as
    they are after few tokens, that costs time, or quality up to the target, never beyond it.
    For `"crc"`, whose promise is an expectation, it holds as well: each unit's loss is at most its running maximum up
    to the last accepted setting, and that is what was bounded. It fails if the threshold changes *within* a unit, or
    looks at the very text that it decides about.

    It departs from FREE and its released code as follows.

    - FREE moves in steps of 0.067 between 0.3 and 0.9, and counts grid points above zeta wherever they lie, so that it
      can rest at the upper end for good. Here it goes down from where right tokens usually are for as long as the
      posterior is above zeta, over candidates of your choice, so that it passes over no confidence at which tokens are
      wrong; the most conservative one is taken if there is none.
    - FREE learns from tokens that left only when a later token runs deep: no confident token, nothing learned. Tokens
      that leave here are never labelled, and those that did not were by that very fact less sure than the threshold.
      So learn from *audits*: every so many texts, one at full depth, whose exits are asked all the same.
    - Sums are kept, not tokens, and there is no limit on how often it is fitted. Until `LEAST_OF_A_KIND` tokens of
      either kind have been seen, FREE's first guesses hold: Beta(2, 1) for right ones, Beta(1, 2) for wrong ones.
    - All exits share one threshold, as everywhere here, where FREE has one exit.

    With `model` a certified one, `tokenizer` and `texts`:

        mixture = BetaMixture(model.exit_certificate.thresholds)
        for number, text in enumerate(texts):
            inputs, audit = tokenizer(text, return_tensors="pt"), number % 10 == 0
            threshold = None if audit else mixture.threshold()  # None: full depth, which loses nothing
            output = model.generate(
                **inputs, exit_threshold=threshold, record_exits=audit, return_dict_in_generate=True
            )
            if audit:
                mixture.observe(*labelled_confidences(output))

    `labelled_confidences` is in `hf_earlyexit.watched_run`. Not for several threads.

    Args:
        candidates: Thresholds in [0, 1] that may be chosen, such as a certificate's `thresholds`, which are the ones
            tested: calibrate one curve on a fine grid, `Search(order="threshold")`, to have many.
        zeta: What the posterior must exceed, between 0 and 1.
        weighted: Whether the posterior takes into account how many tokens were right; FREE's does not.

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
            confidences: Of exits, in [0, 1].
            agreed: Of each, whether the exit's first choice was full depth's.

        Raises:
            ValueError: There are not as many of one as of the other, or a confidence is out of range.
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
        """One of the candidates, by what was observed so far; the same until more is.

        From the first candidate at which right tokens are at home (their mean confidence, or the most conservative
        candidate below it) down for as long as the posterior is above `zeta`; the most conservative one if it is not.
        """
        usual = self.right.alpha / (self.right.alpha + self.right.beta)
        start = next((value for value in self.candidates if value >= usual - ROUNDING), self.candidates[-1])
        down = [value for value in reversed(self.candidates) if value <= start]
        found = list(takewhile(lambda value: self.posterior(value) > self.zeta + ROUNDING, down))
        return found[-1] if found else self.candidates[-1]

    def posterior(self, confidence: float) -> float:
        """The probability that a token which is so sure is right."""
        share = self._counts[0] / sum(self._counts) if self.weighted and self._knows_enough else 0.5
        return posterior_right(confidence, self.right, self.wrong, share)

    @property
    def right(self) -> Beta:
        """The confidences of tokens that were right."""
        return self._fitted(True) or RIGHT_AT_FIRST

    @property
    def wrong(self) -> Beta:
        """The confidences of tokens that were wrong."""
        return self._fitted(False) or WRONG_AT_FIRST

    @property
    def _counts(self) -> list[int]:
        """Tokens seen that were right, and that were wrong."""
        return [self._moments[kind].count for kind in (True, False)]

    @property
    def _knows_enough(self) -> bool:
        return min(self._counts) >= LEAST_OF_A_KIND

    def _fitted(self, kind: bool) -> Beta | None:
        if not self._knows_enough:
            return None
        return Beta.matched(self._moments[kind].mean, self._moments[kind].variance)
