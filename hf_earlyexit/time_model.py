"""Answers for what the steps of a walk take on one machine with one model, and what a whole walk would take.

What it is told of a walk is a `SimulatedWalk`. Measures nothing (that is `time_trials.py`), knows nothing of criteria
but their names, and nothing of what is worth choosing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hf_earlyexit.config import known_fields
from hf_earlyexit.simulation import SimulatedWalk


@dataclass(frozen=True)
class TimeModel:
    """Seconds, on one machine for one model, behind sources and texts of one length.

    Attributes:
        criterion: Whose questions were timed.
        scores: Whether it looks at the vocabulary head.
        rows: At which the following were timed, ascending.
        layer: Of one layer for so many rows.
        head: Of one product with the vocabulary head.
        question: Of asking so many rows at an exit point, without the head.
        step: Of what comes once per token: embeddings, the walk's own loop, the library's.
        departure: Of rows leaving before the last layer.
        payment: Of a payment of owed keys and values, at a layer.
        position: Of each position in it.
        source: Of projecting one row's source for cross-attention, at a layer.
    """

    criterion: str
    scores: bool
    rows: tuple[int, ...]
    layer: tuple[float, ...]
    head: tuple[float, ...]
    question: tuple[float, ...]
    step: tuple[float, ...]
    departure: float
    payment: float
    position: float
    source: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values that JSON can hold."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TimeModel:
        """What `to_dict` has made of one."""
        values = known_fields(cls, dict(values))
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def at(self, seconds: Sequence[float], rows: np.ndarray) -> np.ndarray:
        """Seconds at each of `rows`: between those timed on a line, at 0 rows nothing."""
        table = np.interp(np.arange(int(rows.max(initial=0)) + 1), (0, *self.rows), (0, *seconds))
        return table[rows]

    def seconds(self, walked: SimulatedWalk) -> dict[str, float]:
        """What a walk would take, by what it is spent on."""
        early = walked.departed[:-1] > 0
        batch = np.array([walked.depths.shape[2]])
        return {
            "layers": float(self.at(self.layer, walked.rows).sum()),
            "heads": float(self.at(self.head, walked.head_products).sum()),
            "questions": float(self.at(self.question, walked.questions).sum()) + self.departure * int(early.sum()),
            "catch-up": self.payment * int((walked.owed > 0).sum()) + self.position * int(walked.owed.sum()),
            "source": self.source * int(walked.newcomers.sum()),
            "steps": float(self.at(self.step, batch)[0]) * walked.steps,
        }

    def per_token(self, walked: SimulatedWalk) -> float:
        """Seconds per token of a walk."""
        return sum(self.seconds(walked).values()) / walked.tokens
