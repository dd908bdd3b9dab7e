"""Answers for patience: for how many exit points in a row a token's first choice has been the same.

It sees what an exit point offers and what the earlier ones of the same step have said, neither model nor cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hf_earlyexit.transfer import take


if TYPE_CHECKING:
    from hf_earlyexit.policies import ExitPoint


class Streaks:
    """What rows of a batch have said at the exit points of one step so far, and how often in a row.

    Made anew for every step: what the layers said of the last token says nothing of this one. Kept by batch row, since
    those that go on are ever fewer; and by number of candidates, since a criterion made of several may ask with
    several.
    """

    def __init__(self):
        self._last: dict[int | None, tuple[list[int], torch.Tensor, torch.Tensor]] = {}

    def go_on(self, rows: list[int], choices: torch.Tensor, candidates: int | None = None) -> torch.Tensor:
        """`[rows]`, integers: how many exit points in a row, this one included, have said what it says.

        Args:
            rows: The batch rows, all of which were there at the exit point before.
            choices: `[rows]`, token ids, the first choices here.
            candidates: Among how many tokens they were chosen.
        """
        lengths = torch.ones_like(choices)
        if candidates in self._last:
            before, so_far = self._of(rows, candidates)
            lengths = torch.where(choices == before, so_far + 1, lengths)
        self._last[candidates] = rows, choices, lengths
        return lengths

    def _of(self, rows: list[int], candidates: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The last choices `[rows]` of these, and for how long they have made them."""
        known, choices, lengths = self._last[candidates]
        if rows == known:
            return choices, lengths
        places = {row: place for place, row in enumerate(known)}
        chosen = [places[row] for row in rows]
        return take(choices, chosen), take(lengths, chosen)


@dataclass(frozen=True)
class Patience:
    """One minus 1 over the number of exit points in a row that have made the same first choice, this one included
    (PABEE, "BERT loses patience", arXiv 2006.04152).

    0 where a token is first asked or has changed its mind, 1/2 at the second exit point that says the same, 2/3 at the
    third, and so on. PABEE leaves where `patience` exits in a row have confirmed the one before; that is the threshold
    patience / (patience + 1), and the threshold is the only knob. The number of exit points has no part in it, so that
    a threshold means the same for a model with few and with many; 1 is never reached, and 0 leaves where first asked.

    It departs from the paper in what counts as an exit: every exit point *asked* in the call, so that with
    `exit_layers` a run of three may span more layers. PABEE asks a classifier of its own after every layer. Values are
    in fp64, since 9/10 in fp32 is below the threshold 0.9. With `candidates`, the first choice is among those: a token
    that is none of them and has overtaken them does not break a streak, but is not confirmed either.
    """

    candidates: int | None = None

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        return _sure(point.streak(self.candidates))

    @staticmethod
    def replay(choices: torch.Tensor) -> torch.Tensor:
        """`[N, exit points]`, the confidences of tokens whose first choices there were these `[N, exit points]`: who
        has a memory cannot be read off at some of the exit points that were asked."""
        streaks, rows = Streaks(), list(range(len(choices)))
        return torch.stack([_sure(streaks.go_on(rows, column)) for column in choices.unbind(dim=1)], dim=1)


def _sure(streak: torch.Tensor) -> torch.Tensor:
    streak = streak.double()
    return (streak - 1) / streak
