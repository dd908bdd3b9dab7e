"""Patience: the confidence grows with the number of consecutive exit points that agree on a token's first choice.

Uses the exit point and the earlier exit points of the same step. Independent of the model and the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hf_earlyexit.common.transfer import take


if TYPE_CHECKING:
    from hf_earlyexit.exits.criteria import ExitPoint


class Streaks:
    """The rows' last first choices in one step, and for how many consecutive exit points they have held.

    A new one is made for every step, since streaks do not carry over to the next token. Stored by batch row, since
    rows exit during the step, and by number of candidates, since a criterion that combines several may use several.
    """

    def __init__(self):
        self._last: dict[int | None, tuple[list[int], torch.Tensor, torch.Tensor]] = {}

    def go_on(self, rows: list[int], choices: torch.Tensor, candidates: int | None = None) -> torch.Tensor:
        """Add an exit point; returns its streaks.

        Args:
            rows: The batch rows. All of them must have been at the previous exit point, if there was one.
            choices: `[rows]`, token ids, the first choices at this exit point.
            candidates: Number of candidates that the choices were made among; None: the whole vocabulary.

        Returns:
            `[rows]`, integers: how many consecutive exit points, this one included, have made this choice.
        """
        lengths = torch.ones_like(choices)
        if candidates in self._last:
            before, so_far = self._of(rows, candidates)
            lengths = torch.where(choices == before, so_far + 1, lengths)
        self._last[candidates] = rows, choices, lengths
        return lengths

    def _of(self, rows: list[int], candidates: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The last choices `[rows]` of these rows, and their streaks `[rows]`."""
        known, choices, lengths = self._last[candidates]
        if rows == known:
            return choices, lengths
        places = {row: place for place, row in enumerate(known)}
        chosen = [places[row] for row in rows]
        return take(choices, chosen), take(lengths, chosen)


@dataclass(frozen=True)
class Patience:
    """Confidence 1 - 1/n after n consecutive exit points, this one included, with the same first choice.

    Follows PABEE ("BERT loses patience", arXiv 2006.04152). The confidence is 0 at the first exit point or when the
    first choice changes, 1/2 at the second exit point with the same choice, 2/3 at the third, and so on. PABEE exits
    when `patience` consecutive exits have confirmed the one before them. That is the threshold
    patience / (patience + 1); the threshold is the only parameter. The confidence does not depend on the number of
    exit points, so a threshold means the same for models with few and many of them. A confidence of 1 is never
    reached, and threshold 0 exits at the first exit point.

    Differences from the paper: every exit point *evaluated* in the call counts, so with `exit_layers` a streak of
    three may span more layers. PABEE evaluates a separate classifier after every layer. Values are in fp64, since 9/10
    in fp32 is below the threshold 0.9. With `candidates`, the first choice is among the candidates. If another token
    becomes the best of the vocabulary, the streak does not end, but the row is not confirmed for exit either.
    """

    candidates: int | None = None

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        return _sure(point.streak(self.candidates))

    @staticmethod
    def replay(choices: torch.Tensor) -> torch.Tensor:
        """The confidences `[N, exit points]` for tokens with the first choices `choices [N, exit points]`.

        Needed to evaluate a subset of recorded exit points, since the confidence depends on the earlier ones.
        """
        streaks, rows = Streaks(), list(range(len(choices)))
        return torch.stack([_sure(streaks.go_on(rows, column)) for column in choices.unbind(dim=1)], dim=1)


def _sure(streak: torch.Tensor) -> torch.Tensor:
    streak = streak.double()
    return (streak - 1) / streak
