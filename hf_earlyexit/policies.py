"""Answers for whether a token leaves here: criteria, threshold schedules and batch rules.

A criterion is a frozen dataclass with one verb, `confidence`; a schedule one with the verb `threshold_at`; a batch
rule is a function of who passed. None of them sees the model or the cache: what they may look at is an `ExitPoint`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from hf_earlyexit.patience import Patience, Streaks
from hf_earlyexit.transfer import take, to_host


class Shortlist:
    """The candidates of rows for one token: the best ones of the whole vocabulary where the rows are first asked.

    Made anew for every step, since a token's candidates say nothing of the next one's. A criterion made of several may
    use lists of several lengths.
    """

    def __init__(self):
        self._chosen: dict[int, tuple[list[int], torch.Tensor]] = {}

    def choose(self, rows: list[int], logits: torch.Tensor, count: int) -> None:
        """The `count` best of `logits [rows, vocabulary]` are the rows' candidates from here on."""
        if count > logits.shape[-1]:
            raise ValueError(f"`candidates={count}` must be at most the vocabulary, {logits.shape[-1]}.")
        # By id, as the vocabulary is: of equally likely ones `argmax` then takes the lowest id among them, too.
        self._chosen[count] = rows, logits.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values

    def of(self, rows: list[int], count: int) -> torch.Tensor | None:
        """Token ids `[rows, count]` of these, who were all there when candidates were chosen; None before that."""
        if count not in self._chosen:
            return None
        known, ids = self._chosen[count]
        if rows == known:
            return ids
        places = {row: place for place, row in enumerate(known)}
        return take(ids, [places[row] for row in rows])


class ExitPoint:
    """What some rows of a batch offer to a criterion between two layers.

    Vocabulary and classifier scores are computed when first looked at, once, and counted then; the logits of a token
    that leaves are the ones that were looked at, or that have confirmed it.

    Attributes:
        layer: Layers run so far, counted from 1.
        rows: The batch rows asked about, ascending.
        answer: Their confidences, where the criterion was evaluated together with the layers; else None.
        positions: Their decoder positions, one per row; the first new token of an unprompted T5 is at 0.
        hidden: `[rows, hidden]`, the output of block `layer`, before any norm.
        previous: `[rows, hidden]`, the output of the block below; the embeddings at layer 1.

    It is made with functions of a layer and its hidden states: `score` gives `[rows, vocabulary]`, `classify` gives
    `[rows]`, `score_some` `[rows, candidates]` of token ids; without it candidates are read from all scores. Without a
    `shortlist` and `streaks` it is the first point of its rows.
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
        ] = []  # the best candidates `[rows]` of each list that was scored
        self._confirming: tuple[list[int], torch.Tensor] | None = None  # places, and their full logits

    @cached_property
    def logits(self) -> torch.Tensor:
        """`[rows, vocabulary]`, this layer's head on `hidden`."""
        return self._score(self.layer, self.hidden)

    @property
    def scored(self) -> torch.Tensor | None:
        """The logits if anyone has looked at them."""
        return self.__dict__.get("logits")

    def scores(self, candidates: int | None) -> torch.Tensor:
        """`[rows, vocabulary]`, or `[rows, candidates]`, the logits of the rows' candidates alone.

        At the first exit point of a token, where it has none yet, the whole vocabulary is scored and they are chosen;
        at later ones only they are scored.
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
        """`[rows]`, the ids of the likeliest tokens, or of the likeliest candidates."""
        scores = self.scores(candidates)
        best = scores.argmax(dim=-1)
        if candidates is None or scores is self.scored:
            return best
        return self._shortlist.of(self.rows, candidates).gather(1, best[:, None])[:, 0]

    def streak(self, candidates: int | None = None) -> torch.Tensor:
        """`[rows]`, integers: how many exit points in a row, of those of this step that were looked at so, have made
        the first choice that this one makes; it counts itself, once, however often it is looked at."""
        if candidates not in self._streak:
            choices = self.first_choices(candidates)
            self._streak[candidates] = self._streaks.go_on(self.rows, choices, candidates)
        return self._streak[candidates]

    def confirm(self, passed: list[bool]) -> list[bool]:
        """`passed`, without the rows whose best candidate is not what the whole vocabulary says.

        Candidates may be sure among themselves while a token that is none of them has overtaken them. So the full head
        is evaluated for the rows that have passed, and for them alone; where nobody was judged by candidates there is
        nothing to confirm.
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
        """The places in at most two groups: those whose logits `[rows, vocabulary]` were computed, with these, and
        those whose were not, with None."""
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
        """`[rows]`, this layer's exit classifier on `hidden`."""
        return self._classify(self.layer, self.hidden)

    @property
    def log_probabilities(self) -> torch.Tensor:
        """`[rows, vocabulary]`, in fp32 at least."""
        return log_probabilities(self.logits)


class ExitCriterion(Protocol):
    """How sure a token is, at one exit point. Any object with this method can be an `exit_criterion`."""

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        """`[rows]`, floating point, in [0, 1]. A token leaves when it is at least the threshold. The point's scores
        are those of the head, before any logits processor of the call."""
        ...


@dataclass(frozen=True)
class SoftmaxResponse:
    """Top-1 minus top-2 probability (CALM, arXiv 2207.07061, section 3.5, "softmax response").

    With `candidates`, among those many alone after a token's first exit point (see `ExitPoint.scores`); so for the
    others that look at the vocabulary. Fewer to share it with makes probabilities larger, so a threshold belongs to a
    number of candidates.
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
    """One minus the entropy over its largest value, ln of the vocabulary or of the number of candidates (BranchyNet's
    measure, turned round)."""

    candidates: int | None = None

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        logarithms = log_probabilities(point.scores(self.candidates))
        entropy = -(logarithms.exp() * logarithms).sum(dim=-1)
        return (1 - entropy / math.log(logarithms.shape[-1])).clamp(0, 1)


@dataclass(frozen=True)
class StateSimilarity:
    """Cosine between this layer's output and the last one's (CALM, section 3.5, "hidden-state saturation").

    0 at layer 1, which has no decoder layer below it, so with any threshold above 0 the first layer that can be left
    is 2. Norms are per row; CALM's released code takes them over the whole batch. Negative cosines count as 0.
    """

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        hidden, previous = at_least_float32(point.hidden), at_least_float32(point.previous)
        if point.layer == 1:
            return hidden.new_zeros(len(hidden))
        lengths = torch.linalg.vector_norm(hidden, dim=-1) * torch.linalg.vector_norm(previous, dim=-1)
        # `cosine_similarity` takes three times as long for a few rows.
        return (torch.linalg.vecdot(hidden, previous) / lengths.clamp_(min=1e-12)).clamp_(0, 1)


@dataclass(frozen=True)
class ExitClassifier:
    """A trained classifier's probability that this layer's token is already the last layer's (CALM, section 3.5)."""

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        return point.exit_probability


@dataclass(frozen=True)
class FixedLayer:
    """Sure from `exit_layer` on, never before."""

    exit_layer: int

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        return torch.full((len(point.rows),), float(point.layer >= self.exit_layer))  # on the host: nothing is read


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
    """Whether a criterion is device work alone, of shapes that do not change: it can be part of a recorded graph.

    Candidates and patience are chosen by what earlier exits of the step said, which the host keeps.
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
    """CALM's decaying threshold (section 3.5, equation 5): early tokens must be surer, since later ones build on them.

    clip(0.9 threshold + 0.1 exp(-tau token / max_new_tokens), 0, 1), `token` counted from 0. The paper uses tau 4 for
    softmax and classifier on CNN/DM and WMT and 0 elsewhere.
    """

    threshold: float
    tau: float = 4.0

    def threshold_at(self, token: int, max_new_tokens: int) -> float:
        return min(1.0, max(0.0, 0.9 * self.threshold + 0.1 * math.exp(-self.tau * token / max_new_tokens)))


@dataclass(frozen=True)
class CalmReleasedDecay:
    """The decay as CALM's released code has it: its second term is times the threshold, so it starts at it."""

    threshold: float
    tau: float = 4.0

    def threshold_at(self, token: int, max_new_tokens: int) -> float:
        decay = 0.9 + 0.1 * math.exp(-self.tau * token / max_new_tokens)
        return min(1.0, max(0.0, self.threshold * decay))


SCHEDULES: dict[str, type] = {"constant": Constant, "calm": CalmDecay, "calm_released": CalmReleasedDecay}


def each_row_leaves(passed: list[bool], has_passed: list[bool]) -> list[bool]:
    """`"row"`: every row leaves at its own layer."""
    return passed


def all_leave_once_each_has_passed(passed: list[bool], has_passed: list[bool]) -> list[bool]:
    """`"batch"`: all leave where the last live row passes; who has passed stays passed (arXiv 2407.20272, latched)."""
    return [all(has_passed)] * len(passed)


def all_leave_where_all_pass(passed: list[bool], has_passed: list[bool]) -> list[bool]:
    """`"batch_joint"`: all leave at the first layer where all pass (CALM's released code)."""
    return [all(passed)] * len(passed)


BATCH_RULES: dict[str, Callable[[list[bool], list[bool]], list[bool]]] = {
    "row": each_row_leaves,
    "batch": all_leave_once_each_has_passed,
    "batch_joint": all_leave_where_all_pass,
}


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, in fp32 at least."""
    return torch.log_softmax(at_least_float32(logits), dim=-1)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precisions as fp32; fp32 and fp64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
