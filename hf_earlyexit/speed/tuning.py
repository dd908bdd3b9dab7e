"""Choose exit points: the set that is fastest on this machine, if any set beats full depth.

Simulates every set of exit points on recorded exits and predicts its time with a time model. It assumes that the first
layer at which a token passes does not depend on the set. In reality a token that exits later writes different keys and
values, so later tokens may exit elsewhere and differ: measure the chosen set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from tqdm import tqdm

from hf_earlyexit.speed.simulation import batches_of, simulate
from hf_earlyexit.speed.time_model import TimeModel


MARGIN = 0.02
ALL_SETS = 12  # up to this many exit points, every subset is tried: 4,095 sets


@dataclass(frozen=True)
class Choice:
    """A set of exit points and its predicted cost.

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
    """The predictions of the time model.

    Attributes:
        full_depth: Without exits.
        ranking: All sets that were tried, the fastest first.
        margin: The share of full depth's time that a set must save to be chosen.
    """

    full_depth: Choice
    ranking: list[Choice]
    margin: float = MARGIN

    def ratio(self, choice: Choice) -> float:
        """Its time over full depth's."""
        return choice.seconds / self.full_depth.seconds

    @property
    def best(self) -> Choice | None:
        """The fastest set; None if early exit saves less than the margin."""
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
        layers_run: Recorded with all exit points evaluated: for each token of each text, the first layer at which it
            passed. With fewer exit points, it exits at the next one above.
        exit_points: The exit points to choose from. Up to 12: all sets are tried. More: the least useful one is
            removed repeatedly, and the sets on the way are tried.
        num_layers: Layers of the decoder.
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
    """All non-empty sets."""
    points = sorted(exit_points)
    return (chosen for size in range(1, len(points) + 1) for chosen in combinations(points, size))


def greedy(exit_points: Iterable[int], predict: Callable[[tuple[int, ...]], Choice]) -> Iterator[Choice]:
    """All exit points, then all sets with one fewer; continue from the fastest of these until one point is left."""
    points = tuple(sorted(exit_points))
    yield predict(points)
    while len(points) > 1:
        tried = [predict(tuple(np.delete(points, place).tolist())) for place in range(len(points))]
        yield from tried
        points = min(tried, key=lambda choice: choice.seconds).exit_layers
