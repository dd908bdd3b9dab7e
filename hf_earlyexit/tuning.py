"""Answers for where to ask: which exit points are worth their questions on this machine, if any are.

Arithmetic on a time model and on recorded exits: each set of exit points is walked in thought, and timed by the model.
It takes for granted that the layer from which on a token may leave stays what it was. In truth a token that leaves
later writes other keys and values, so that tokens after it may leave elsewhere and say something else: measure what is
chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from tqdm import tqdm

from hf_earlyexit.simulation import batches_of, simulate
from hf_earlyexit.time_model import TimeModel


MARGIN = 0.02
ALL_SETS = 12  # exit points of which every subset is tried: 4,095 sets


@dataclass(frozen=True)
class Choice:
    """A set of exit points, and what asking there would come to.

    Attributes:
        exit_layers: The set; empty for full depth.
        seconds: Per token.
        mean_layers: Per token.
    """

    exit_layers: tuple[int, ...]
    seconds: float
    mean_layers: float


@dataclass(frozen=True)
class Tuning:
    """What the time model says.

    Attributes:
        full_depth: Without any question.
        ranking: All sets that were tried, the fastest first.
        margin: By how much of full depth's time a set must beat it to be worth it.
    """

    full_depth: Choice
    ranking: list[Choice]
    margin: float = MARGIN

    def ratio(self, choice: Choice) -> float:
        """Its time over full depth's."""
        return choice.seconds / self.full_depth.seconds

    @property
    def best(self) -> Choice | None:
        """The fastest set; None: early exit does not pay here."""
        fastest = self.ranking[0]
        return fastest if self.ratio(fastest) < 1 - self.margin else None


def tune(
    time_model: TimeModel,
    layers_run: Sequence[Sequence[int]],
    exit_points: Sequence[int],
    num_layers: int,
    *,
    batch_size: int = 1,
    rule: str = "row",
) -> Tuning:
    """Try the sets of exit points.

    Args:
        time_model: Of this machine and model, for a batch of this size.
        layers_run: Recorded with all exit points asked: for each token of each text the first layer at which it
            passed. Where fewer are asked, it leaves at the next one above.
        exit_points: Of which sets are made: all sets if there are at most 12, else those met while the least useful
            one is taken away, again and again.
        num_layers: Of the decoder.
        batch_size: Texts walked together, in their order.
        rule: `"row"` or `"batch"`, see `simulate`.

    Raises:
        ValueError: There are no texts, or no exit points.
    """
    if not layers_run or not exit_points:
        raise ValueError("`layers_run` and `exit_points` must not be empty: there would be nothing to choose.")
    could_leave = batches_of(layers_run, batch_size)

    def predict(exit_layers: tuple[int, ...]) -> Choice:
        scores = time_model.scores and bool(exit_layers)
        walked = simulate(could_leave, num_layers, exit_layers, scores=scores, rule=rule)
        return Choice(exit_layers, time_model.per_token(walked), walked.mean_layers)

    few = len(exit_points) <= ALL_SETS
    tried = map(predict, all_sets(exit_points)) if few else greedy(exit_points, predict)
    count = 2 ** len(exit_points) - 1 if few else len(exit_points) * (len(exit_points) + 1) // 2
    ranking = sorted(tqdm(tried, "exit points", count, leave=False, disable=None), key=lambda choice: choice.seconds)
    return Tuning(predict(()), ranking)


def all_sets(exit_points: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """All sets that are not empty."""
    points = sorted(exit_points)
    return (chosen for size in range(1, len(points) + 1) for chosen in combinations(points, size))


def greedy(exit_points: Iterable[int], predict: Callable[[tuple[int, ...]], Choice]) -> Iterator[Choice]:
    """All exit points, then those left as the one is taken away without which it is fastest, until one is left."""
    points = tuple(sorted(exit_points))
    yield predict(points)
    while len(points) > 1:
        tried = [predict(tuple(np.delete(points, place).tolist())) for place in range(len(points))]
        yield from tried
        points = min(tried, key=lambda choice: choice.seconds).exit_layers
