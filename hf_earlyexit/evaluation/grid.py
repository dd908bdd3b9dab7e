"""The grid of an evaluation: candidates, and cells of candidate, batch rule and batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_earlyexit.decoding.candidates import (
    FULL_DEPTH,
    STATIC,
    Candidate,
    check_candidates,
    curve_candidates,
    default_curves,
    full_depth,
    static_decoders,
)
from hf_earlyexit.families.t5.modeling import EarlyExitT5ForConditionalGeneration


ROW, BATCH = "row", "batch"


@dataclass(frozen=True)
class Grid:
    """The settings to evaluate.

    Attributes:
        curves: Thresholds by curve (see `candidates.curve_candidates`); None: `candidates.CURVES`.
        batch_sizes: Inputs per batch where time is measured.
        batch_rules: Values of `batch_exit`. At batch size 1 all are the same, and `"row"` stands for them.
        rounds: Batches that each cell is timed on.
        points: Points of ROUGE-L that the best threshold may lose.
        writing_batch_size: Inputs per batch where nothing is timed and rows do not wait for each other.
    """

    curves: Mapping[str, Sequence[float]] | None = None
    batch_sizes: Sequence[int] = (1, 4, 8, 16)
    batch_rules: Sequence[str] = (ROW, BATCH)
    rounds: int = 31
    points: float = 2.0
    writing_batch_size: int = 16

    def __post_init__(self):
        for name, least in (("rounds", 2), ("writing_batch_size", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"`{name}` must be a whole number of at least {least}, got {getattr(self, name)!r}.")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"`batch_sizes` must be numbers of at least 1, got {list(self.batch_sizes)!r}.")
        if not self.batch_rules:
            raise ValueError("`batch_rules` must have at least one, got none: 'row' or 'batch'.")
        for name in ("batch_sizes", "batch_rules"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"`{name}` repeats a value: remove the duplicate from {list(getattr(self, name))!r}.")

    def candidates(self, model: EarlyExitT5ForConditionalGeneration) -> list[Candidate]:
        """Full depth, the static decoders, and every threshold of every curve; checked against the model."""
        curves = self.curves or default_curves(model.early_exit)
        found = [one for curve, thresholds in curves.items() for one in curve_candidates(curve, thresholds)]
        ruled = [
            replace(one, keywords=one.keywords | {"batch_exit": rule}) for one in found for rule in self.batch_rules
        ]
        check_candidates(ruled, model.early_exit, model.config.num_decoder_layers)
        return [full_depth(), *static_decoders(model.early_exit.exit_layers), *found]

    def cells(self, candidates: Sequence[Candidate]) -> list[Cell]:
        """All cells to time."""
        return [
            Cell(candidate, rule, size)
            for candidate in candidates
            for size in self.batch_sizes
            for rule in (self.batch_rules if is_on_a_curve(candidate.curve) and size > 1 else (ROW,))
        ]


@dataclass(frozen=True)
class Cell:
    """A candidate under a batch rule, at a batch size."""

    candidate: Candidate
    rule: str
    size: int

    @property
    def waits(self) -> bool:
        """Whether rows wait for each other, so that texts depend on the batch size."""
        return self.rule != ROW

    @property
    def quality(self) -> str:
        """The key of its texts, shared by all cells that write the same texts."""
        return f"{self.candidate.name} | {self.rule} of {self.size}" if self.waits else self.candidate.name

    @property
    def key(self) -> str:
        return f"{self.candidate.name} | {self.rule} of {self.size} | time"

    @property
    def keywords(self) -> dict[str, Any]:
        """Keywords of `generate`."""
        rule = {"batch_exit": self.rule} if is_on_a_curve(self.candidate.curve) else {}
        return {**self.candidate.keywords, **rule}


def is_on_a_curve(curve: str) -> bool:
    """Whether the curve belongs to a criterion and is not a baseline."""
    return curve not in (FULL_DEPTH, STATIC)
