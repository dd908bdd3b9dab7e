"""Exit criteria, threshold schedules and batch rules.

A criterion is a frozen dataclass with the method `confidence`, a schedule one with the method `threshold_at`. A batch
rule is a function of the rows that passed the threshold. Independent of the model and the cache: an `ExitPoint` holds
all that a criterion can use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from hf_earlyexit.common.transfer import take, to_host
from hf_earlyexit.exits.patience import Patience, Streaks


class Shortlist:
    """Candidate tokens of the rows for one step: the best of the whole vocabulary at the rows' first exit point.

    A new one is made for every step, since candidates do not carry over to the next token. A criterion that combines
    several may use lists of different lengths.
    """

    def __init__(self):
        self._chosen: dict[int, tuple[list[int], torch.Tensor]] = {}

    def choose(self, rows: list[int], logits: torch.Tensor, count: int) -> None:
        """Make the `count` best tokens of `logits [rows, vocabulary]` the rows' candidates for this step."""
        if count > logits.shape[-1]:
            raise ValueError(f"`candidates={count}` must be at most the vocabulary, {logits.shape[-1]}.")
        # Sorted by id like the vocabulary, so that `argmax` resolves ties to the lowest id here, too.
        self._chosen[count] = rows, logits.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values

    def of(self, rows: list[int], count: int) -> torch.Tensor | None:
        """The candidates' token ids `[rows, count]`; None if not chosen yet.

        All of `rows` must be among the rows for which candidates were chosen.
        """
        if count not in self._chosen:
            return None
        known, ids = self._chosen[count]
        if rows == known:
            return ids
        places = {row: place for place, row in enumerate(known)}
        return take(ids, [places[row] for row in rows])


class ExitPoint:
    """The input of a criterion: some rows of a batch after a layer.

    Vocabulary and classifier scores are computed once, at first use, and counted then. The logits of an exiting token
    are those computed by the criterion or by `confirm`, if any.

    Attributes:
        layer: Number of layers run so far, counted from 1.
        rows: The batch rows to evaluate, ascending.
        answer: The rows' confidences, if the criterion was evaluated together with the layers; else None.
        positions: The rows' decoder positions; the first new token of an unprompted T5 is at 0.
        hidden: `[rows, hidden]`, the output of block `layer`, before any norm.
        previous: `[rows, hidden]`, the output of the block below; the embeddings at layer 1.

    The constructor takes functions of a layer and its hidden states. `score` returns `[rows, vocabulary]`, `classify`
    returns `[rows]`, and `score_some` returns `[rows, candidates]` for given token ids. Without `score_some`,
    candidates are read from the full scores. Without `shortlist` and `streaks`, this is the first exit point of its
    rows.
    """

    def __init__(
        self,
        layer: int,
        rows: list[int],
        positions: list[int],
        hidden: torch.Tensor,
        previous: torch.Tensor,
        score: Callable[[int, torch.Tensor], torch.Tensor],
        classify: Callable[[int, torch.Tensor], torch.Tensor],
        score_some: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        shortlist: Shortlist | None = None,
        streaks: Streaks | None = None,
    ):
        self.layer, self.rows, self.positions = layer, rows, positions
        self.hidden, self.previous = hidden, previous
        self._score, self._classify, self._score_some = score, classify, score_some
        self._shortlist, self._streaks = shortlist or Shortlist(), streaks or Streaks()
        self.answer: list[float] | None = None
        self._streak: dict[int | None, torch.Tensor] = {}
        self._scores: dict[int, torch.Tensor] = {}
        self._judged: list[
            tuple[torch.Tensor, torch.Tensor]
        ] = []  # candidate ids and logits, `[rows, candidates]` each, of each list that was scored
        self._confirming: tuple[list[int], torch.Tensor] | None = None  # indices of rows, and their full logits

    @cached_property
    def logits(self) -> torch.Tensor:
        """`[rows, vocabulary]`, this layer's head applied to `hidden`."""
        return self._score(self.layer, self.hidden)

    @property
    def scored(self) -> torch.Tensor | None:
        """The logits if they have been computed, else None."""
        return self.__dict__.get("logits")

    def scores(self, candidates: int | None) -> torch.Tensor:
        """Logits of the whole vocabulary `[rows, vocabulary]`, or of the rows' candidates `[rows, candidates]`.

        At a token's first exit point, the whole vocabulary is scored and the candidates are chosen. At later exit
        points, only the candidates are scored.
        """
        if candidates is None:
            return self.logits
        if candidates not in self._scores:
            self._scores[candidates] = self._candidate_scores(candidates)
        return self._scores[candidates]

    def _candidate_scores(self, count: int) -> torch.Tensor:
        ids = self._shortlist.of(self.rows, count)
        if ids is None:
            self._shortlist.choose(self.rows, self.logits, count)
            return self.logits
        if self._score_some is None:
            logits = self.logits.gather(1, ids)
        else:
            logits = self._score_some(self.layer, self.hidden, ids)
        self._judged.append((ids, logits))
        return logits

    def first_choices(self, candidates: int | None = None) -> torch.Tensor:
        """`[rows]`, the ids of the most likely tokens, or of the most likely candidates."""
        scores = self.scores(candidates)
        best = scores.argmax(dim=-1)
        if candidates is None or scores is self.scored:
            return best
        return self._shortlist.of(self.rows, candidates).gather(1, best[:, None])[:, 0]

    def streak(self, candidates: int | None = None) -> torch.Tensor:
        """`[rows]`, integers: for how many consecutive exit points, this one included, the first choice is the same.

        Considers only exit points of this step at which the method was called with the same `candidates`. Repeated
        calls at one exit point count once.
        """
        if candidates not in self._streak:
            choices = self.first_choices(candidates)
            self._streak[candidates] = self._streaks.go_on(self.rows, choices, candidates)
        return self._streak[candidates]

    def confirm(self, passed: list[bool]) -> list[bool]:
        """`passed`, without the rows whose best candidate is not the best token of the whole vocabulary.

        The confidence among candidates can be high although a token outside of them has become the best. So the full
        head is evaluated for the rows that have passed, and only for these. If no row was evaluated on candidates,
        `passed` is returned unchanged.
        """
        places = [place for place, ok in enumerate(passed) if ok]
        if not places or not self._judged:
            return passed
        if self.scored is not None:
            logits = take(self.scored, places)
        else:
            logits = self._score(self.layer, take(self.hidden, places))
        self._confirming = places, logits
        says = logits.argmax(dim=-1)
        favourites = [ids.gather(1, logits.argmax(dim=-1, keepdim=True))[:, 0] for ids, logits in self._judged]
        agrees = torch.stack([take(favourite, places) == says for favourite in favourites]).all(dim=0)
        confirmed = {place for place, ok in zip(places, to_host(agrees), strict=True) if ok}
        return [place in confirmed for place in range(len(passed))]

    def known_logits(self, places: list[int]) -> list[tuple[list[int], torch.Tensor | None]]:
        """`places`, indices of rows, grouped by whether their logits were computed.

        Returns at most two groups: indices with their logits `[rows, vocabulary]`, and indices with None.
        """
        if self.scored is not None:
            return [(places, take(self.scored, places))]
        seen, logits = self._confirming or ([], None)
        where = {place: index for index, place in enumerate(seen)}
        known = [place for place in places if place in where]
        groups = [(known, take(logits, [where[place] for place in known]))] if known else []
        unknown = [place for place in places if place not in where]
        return [*groups, (unknown, None)] if unknown else groups

    @cached_property
    def exit_probability(self) -> torch.Tensor:
        """`[rows]`, this layer's exit classifier applied to `hidden`."""
        return self._classify(self.layer, self.hidden)

    @property
    def log_probabilities(self) -> torch.Tensor:
        """`[rows, vocabulary]`, in at least fp32."""
        return log_probabilities(self.logits)


class ExitCriterion(Protocol):
    """The confidence of tokens at one exit point. Any object with this method can be an `exit_criterion`."""

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        """`[rows]`, floating point, in [0, 1].

        A token exits when its confidence is at least the threshold. The point's scores are those of the head, before
        any logits processor of the call.
        """
        ...


@dataclass(frozen=True)
class SoftmaxResponse:
    """Top-1 minus top-2 probability (CALM, arXiv 2207.07061, section 3.5, "softmax response").

    With `candidates`, probabilities after a token's first exit point are taken over that many candidates only (see
    `ExitPoint.scores`). The same holds for the other criteria that use the vocabulary. Probabilities are larger over
    fewer candidates, so a threshold is valid for one number of candidates.
    """

    candidates: int | None = None

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        logits = at_least_float32(point.scores(self.candidates))
        top = (logits.topk(2, dim=-1).values - logits.logsumexp(dim=-1, keepdim=True)).exp()
        return top[:, 0] - top[:, 1]


@dataclass(frozen=True)
class MaxProbability:
    """The top-1 probability."""

    candidates: int | None = None

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        logits = at_least_float32(point.scores(self.candidates))
        return (logits.amax(dim=-1) - logits.logsumexp(dim=-1)).exp()


@dataclass(frozen=True)
class Entropy:
    """One minus the normalised entropy (BranchyNet's measure, reversed).

    The entropy is divided by its largest value, ln of the vocabulary size or of the number of candidates.
    """

    candidates: int | None = None

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        logarithms = log_probabilities(point.scores(self.candidates))
        entropy = -(logarithms.exp() * logarithms).sum(dim=-1)
        return (1 - entropy / math.log(logarithms.shape[-1])).clamp(0, 1)


@dataclass(frozen=True)
class StateSimilarity:
    """Cosine between the outputs of this layer and the layer below (CALM, section 3.5, "hidden-state saturation").

    0 at layer 1, which has no decoder layer below it, so with any threshold above 0 the first possible exit is after
    layer 2. Norms are per row; CALM's released code takes them over the whole batch. Negative cosines count as 0.
    """

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        hidden, previous = at_least_float32(point.hidden), at_least_float32(point.previous)
        if point.layer == 1:
            return hidden.new_zeros(len(hidden))
        lengths = torch.linalg.vector_norm(hidden, dim=-1) * torch.linalg.vector_norm(previous, dim=-1)
        # `cosine_similarity` is three times slower for a few rows.
        return (torch.linalg.vecdot(hidden, previous) / lengths.clamp_(min=1e-12)).clamp_(0, 1)


@dataclass(frozen=True)
class ExitClassifier:
    """A trained classifier's probability that this layer predicts the last layer's token (CALM, section 3.5)."""

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        return point.exit_probability


@dataclass(frozen=True)
class FixedLayer:
    """Confidence 1 from `exit_layer` on, 0 before."""

    exit_layer: int

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        return torch.full((len(point.rows),), float(point.layer >= self.exit_layer))  # on the host: no device read


CRITERIA: dict[str, type] = {
    "softmax": SoftmaxResponse,
    "max_prob": MaxProbability,
    "entropy": Entropy,
    "state": StateSimilarity,
    "classifier": ExitClassifier,
    "patience": Patience,
    "fixed": FixedLayer,
}
ON_DEVICE = (SoftmaxResponse, MaxProbability, Entropy, StateSimilarity, ExitClassifier)
WITH_CANDIDATES = tuple(name for name, kind in CRITERIA.items() if hasattr(kind, "candidates"))


def needs_no_host(criterion: ExitCriterion) -> bool:
    """Whether a criterion runs entirely on the device with fixed shapes, so that it can be part of a recorded graph.

    Candidates and patience depend on earlier exits of the step, whose state is kept on the host.
    """
    return type(criterion) in ON_DEVICE and getattr(criterion, "candidates", None) is None


@dataclass(frozen=True)
class Constant:
    """The same threshold for every token."""

    threshold: float

    def threshold_at(self, token: int, max_new_tokens: int) -> float:
        return self.threshold


@dataclass(frozen=True)
class CalmDecay:
    """CALM's decaying threshold (section 3.5, equation 5).

    Early tokens need a higher confidence, since later ones depend on them. The threshold is
    clip(0.9 threshold + 0.1 exp(-tau token / max_new_tokens), 0, 1), with `token` counted from 0. The paper uses tau 4
    for softmax and classifier on CNN/DM and WMT, and 0 elsewhere.
    """

    threshold: float
    tau: float = 4.0

    def threshold_at(self, token: int, max_new_tokens: int) -> float:
        return min(1.0, max(0.0, 0.9 * self.threshold + 0.1 * math.exp(-self.tau * token / max_new_tokens)))


@dataclass(frozen=True)
class CalmReleasedDecay:
    """The decay in CALM's released code: the second term is multiplied by `threshold`, so it starts at `threshold`."""

    threshold: float
    tau: float = 4.0

    def threshold_at(self, token: int, max_new_tokens: int) -> float:
        decay = 0.9 + 0.1 * math.exp(-self.tau * token / max_new_tokens)
        return min(1.0, max(0.0, self.threshold * decay))


SCHEDULES: dict[str, type] = {"constant": Constant, "calm": CalmDecay, "calm_released": CalmReleasedDecay}


def each_row_leaves(passed: list[bool], has_passed: list[bool]) -> list[bool]:
    """`"row"`: every row exits at its own layer."""
    return passed


def all_leave_once_each_has_passed(passed: list[bool], has_passed: list[bool]) -> list[bool]:
    """`"batch"`: all rows exit once each live row has passed, here or earlier (arXiv 2407.20272, latched)."""
    return [all(has_passed)] * len(passed)


def all_leave_where_all_pass(passed: list[bool], has_passed: list[bool]) -> list[bool]:
    """`"batch_joint"`: all rows exit at the first layer where all pass (CALM's released code)."""
    return [all(passed)] * len(passed)


BATCH_RULES: dict[str, Callable[[list[bool], list[bool]], list[bool]]] = {
    "row": each_row_leaves,
    "batch": all_leave_once_each_has_passed,
    "batch_joint": all_leave_where_all_pass,
}


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities over the last dimension, in at least fp32."""
    return torch.log_softmax(at_least_float32(logits), dim=-1)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Convert half precision to fp32; fp32 and fp64 stay unchanged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
