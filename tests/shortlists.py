"""A slow reference for exits on candidates, computed from the full scores of every layer."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import takewhile

import torch


SURE = {
    "softmax": lambda probabilities: probabilities.topk(2).values @ probabilities.new_tensor([1.0, -1.0]),
    "max_prob": lambda probabilities: probabilities.max(),
    "entropy": lambda probabilities: 1 - torch.special.entr(probabilities).sum() / math.log(len(probabilities)),
}


def length_of_the_last_run(said: list[int]) -> int:
    """The number of equal values at the end: 2 for 5, 5, 7, 5, 5."""
    return len(list(takewhile(lambda choice: choice == said[-1], reversed(said))))


@dataclass
class Exits:
    """One step: exit layers by row, scored rows by layer, and how many confident rows were not confirmed."""

    layers: dict[int, int] = field(default_factory=dict)
    heads: Counter = field(default_factory=Counter)
    candidates: Counter = field(default_factory=Counter)
    refused: int = 0


def exits_by_candidates(
    scores: dict[int, torch.Tensor], rows: list[int], criterion: str, count: int, threshold: float, rule: str = "row"
) -> Exits:
    """The exits of one step.

    Args:
        scores: `[batch, vocabulary]` at each evaluated exit layer and at the last layer, ascending.
        rows: The live rows.
        criterion, count, threshold, rule: As of `generate`.
    """
    found, (first, *_), last = Exits(), scores, max(scores)
    candidates = {row: scores[first][row].topk(count).indices.sort().values for row in rows}
    staying, latched, said = list(rows), set(), {row: [] for row in rows}
    for layer in [layer for layer in scores if layer != last]:
        known, passed = set(), []
        for row in staying:
            full = scores[layer][row]
            seen = full if layer == first else full[candidates[row]]
            choice = int(seen.argmax() if layer == first else candidates[row][seen.argmax()])
            said[row] = [*said[row], choice]
            if criterion == "patience":
                sure = 1 - Fraction(1, length_of_the_last_run(said[row])) >= threshold
            else:
                sure = bool(SURE[criterion](seen.softmax(dim=-1)) >= threshold)
            known |= {row} if layer == first or sure else set()
            found.candidates[layer] += 0 if layer == first else count
            confirmed = choice == int(full.argmax())
            found.refused += sure and not confirmed
            passed += [row] if sure and confirmed else []
        latched |= set(passed)
        everyone = {"row": None, "batch": latched, "batch_joint": set(passed)}[rule]
        leaving = passed if everyone is None else staying if set(staying) <= everyone else []
        found.heads[layer] += len(known | set(leaving))  # rows that exit only by the batch rule need logits
        found.layers |= dict.fromkeys(leaving, layer)
        staying = [row for row in staying if row not in leaving]
    found.heads[last] += len(staying)
    found.layers |= dict.fromkeys(staying, last)
    return found
