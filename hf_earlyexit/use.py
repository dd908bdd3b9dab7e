"""Answers for how a model will be used, all of which a promise about its quality is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_earlyexit.config import is_integer
from hf_earlyexit.implementations import check_implementations


SHARED = ("exit_schedule", "exit_candidates", "batch_exit", "fill")


@dataclass(frozen=True)
class Use:
    """How the model will be used, all of which a promise is about.

    Attributes:
        batch_size: Inputs at once. Where rows wait for each other (`batch_exit` other than `"row"`) the unit is a
            batch of exactly that many, whose loss is the mean of its rows'. Elsewhere it matters for time only.
        exits: Exit settings of every candidate: `exit_schedule`, `batch_exit`, `fill`; and `exit_candidates`, of those
            whose criterion looks at the vocabulary.
        generation: Keywords of `generate` besides the exits, over the model's generation_config. No sampling.
        max_source_tokens: Longer inputs are cut; None: never.
        implementations: Ways to run the decoder that are promised about, of `"plain"`, `"prepared"` and `"compiled"`.
            The first is measured and timed, the others must agree: a loss is then the largest over all of them. None:
            as the model is, prepared or plain.
    """

    batch_size: int = 1
    exits: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    max_source_tokens: int | None = None
    implementations: Sequence[str] | None = None

    def __post_init__(self):
        if self.implementations is not None:
            check_implementations(self.implementations)
        for name in ("batch_size", "max_source_tokens"):
            value = getattr(self, name)
            if value is not None and (not is_integer(value) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        if unknown := sorted(set(self.exits) - set(SHARED)):
            raise ValueError(
                f"`exits` may have {list(SHARED)}, got {unknown[0]!r}: name criteria as curves of a search."
            )

    @property
    def rows_per_batch(self) -> int | None:
        """Rows that wait for each other."""
        return self.batch_size if self.exits.get("batch_exit", "row") != "row" and self.batch_size > 1 else None
