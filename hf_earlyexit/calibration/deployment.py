"""The deployment settings that a certificate is tested with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_earlyexit.common.values import is_integer
from hf_earlyexit.generation.implementations import check_implementations


SHARED = ("exit_schedule", "exit_candidates", "batch_exit", "fill")


@dataclass(frozen=True)
class DeploymentSettings:
    """How the model will be used. The guarantee holds for these settings.

    Attributes:
        batch_size: Inputs per batch. If rows wait for each other (`batch_exit` other than `"row"`), the unit is a
            batch of exactly that many inputs, whose loss is the mean of its rows' losses. Otherwise the batch size
            matters only for time.
        exits: Exit settings of every candidate: `exit_schedule`, `batch_exit`, `fill`; and `exit_candidates`, which
            only candidates whose criterion reads the vocabulary get.
        generation: Keywords of `generate` besides the exit settings; they override the model's generation_config.
            Sampling is not allowed.
        max_source_tokens: Longer inputs are truncated; None: never.
        implementations: Implementations of the decoder that the guarantee covers, of `"plain"`, `"prepared"` and
            `"compiled"`. The first is measured and timed. The others are compared with it: a loss is then the largest
            over all of them. None: the current state of the model, prepared or plain.
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
        """The number of rows that wait for each other; None if rows do not."""
        return self.batch_size if self.exits.get("batch_exit", "row") != "row" and self.batch_size > 1 else None
