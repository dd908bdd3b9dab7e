"""A time model of decoding on this machine, fitted to timed walks of known work.

`TimeModel` predicts the time of a simulated walk (`SimulatedWalk`). `measure_time_model` times walks that are
simulated as well, and solves for the time of each kind of step. The tokens of these walks are discarded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from random import Random
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutput

from hf_earlyexit.common.values import known_fields
from hf_earlyexit.exits.criteria import CRITERIA, WITH_CANDIDATES, ExitCriterion
from hf_earlyexit.speed.roofline import CATCH_UP, CROSS, HEADS, LAYERS, REST, SOURCE
from hf_earlyexit.speed.simulation import SimulatedWalk, simulate
from hf_earlyexit.speed.timed_walk import Replay, seconds_of, source_states, timed, walk
from hf_earlyexit.speed.timing import take_turns


@dataclass(frozen=True)
class TimeModel:
    """Seconds on one machine for one model, at one source length and one text length.

    Attributes:
        criterion: The criterion that was timed.
        scores: Whether it reads the vocabulary head.
        rows: Row counts at which the following were timed, ascending.
        layer: One layer, for each row count.
        head: One product with the vocabulary head, for each row count.
        question: Evaluating an exit without the head, for each row count.
        step: Work once per step, for each row count: embeddings, the loop of the decoder walk and the library's loop.
        departure: Rows exiting before the last layer.
        payment: One backfill of missing keys and values at a layer.
        position: Each position of a backfill.
        source: Projecting the source of one row for cross-attention, at a layer.
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
        """The inverse of `to_dict`."""
        values = known_fields(cls, dict(values))
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def at(self, seconds: Sequence[float], rows: np.ndarray) -> np.ndarray:
        """Seconds at each of `rows`, interpolated linearly between the timed row counts; 0 rows take no time."""
        table = np.interp(np.arange(int(rows.max(initial=0)) + 1), (0, *self.rows), (0, *seconds))
        return table[rows]

    def seconds(self, walked: SimulatedWalk) -> dict[str, float]:
        """Predicted seconds of a walk, by kind of work."""
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


SHORT, LONG = 2, 12  # one token in so many runs all layers: it backfills 1 position, or 11


@dataclass(frozen=True)
class Trial:
    """A walk that is timed repeatedly for the model.

    Attributes:
        exit_layers: Where exits are evaluated.
        script: Where rows exit, and the criterion that is evaluated.
        work: The simulated work.
    """

    exit_layers: Sequence[int]
    script: Replay
    work: SimulatedWalk


def measure_time_model(
    model: Any,
    criterion: str,
    *,
    batch_size: int = 1,
    source: int = 64,
    new_tokens: int = 48,
    rounds: int = 5,
    after_round: Callable[[], Any] = int,
) -> TimeModel:
    """Measure a time model. Takes `rounds` times about ten short texts for each row count.

    Args:
        model: In eval mode, with exit points.
        criterion: The criterion to time, a name of `CRITERIA`.
        batch_size: Row counts are the powers of two below this, and this.
        source: Source positions of each row.
        new_tokens: Tokens of each text.
        rounds: How often everything is timed; medians are used.
        after_round: Called after each round; there are `rounds` for each row count.
    """
    rows = rows_to_time(batch_size)
    found = [_measure_at(model, criterion, count, source, new_tokens, rounds, after_round) for count in rows]
    by_rows = {name: tuple(one[name] for one in found) for name in ("layer", "head", "question", "step")}
    of_batch = {name: found[-1][name] for name in ("departure", "payment", "position", "source")}
    return TimeModel(criterion, criterion in WITH_CANDIDATES, rows, **by_rows, **of_batch)


def rows_to_time(batch_size: int) -> tuple[int, ...]:
    """The powers of two below the batch size, and the batch size."""
    return (*(2**power for power in range(batch_size.bit_length()) if 2**power < batch_size), batch_size)


def rounds_in_all(batch_size: int, rounds: int) -> int:
    """How often `measure_time_model` calls `after_round`."""
    return rounds * len(rows_to_time(batch_size))


def _measure_at(model, criterion: str, rows: int, source: int, new_tokens: int, rounds: int, after_round) -> dict:
    """All measurements at one row count."""
    states = source_states(model, rows, source)
    trials = trials_for(model, CRITERIA[criterion](), criterion in WITH_CANDIDATES, rows, new_tokens)
    parts, whole = _time(model, states, trials, rounds, after_round)
    return solve(trials, parts, whole)


def trials_for(model: Any, asked: ExitCriterion, scores: bool, rows: int, new_tokens: int) -> dict[str, Trial]:
    """Walks of known work.

    No criterion; a criterion at every exit that never passes; every other row exiting so late that little else
    changes; and backfills of few and of many positions.
    """
    depth, exits = model.config.num_decoder_layers, model.early_exit.exit_layers
    place = np.arange(new_tokens)[:, None] + np.arange(rows)
    never = np.full_like(place, depth)
    late = np.where(np.arange(rows) % 2, never, exits[-1])
    paying = {f"every {each}": np.where(place % each == each - 1, depth, exits[0]) for each in (SHORT, LONG)}
    trials = {
        "never": _trial(never, (), None, False, depth),
        "in vain": _trial(never, exits, asked, scores, depth),
        "late": _trial(late, exits[-1:], asked, scores, depth),
    }
    return trials | {name: _trial(where, exits[:1], None, False, depth) for name, where in paying.items()}


def _trial(where: np.ndarray, exit_layers: Sequence[int], asked: ExitCriterion | None, scores: bool, depth: int):
    return Trial(exit_layers, Replay(where, asked), simulate(where[None], depth, exit_layers, scores=scores))


def _time(
    model: Any, states: torch.Tensor, trials: Mapping[str, Trial], rounds: int, after_round: Callable[[], Any]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Medians over rounds.

    Returns the seconds of each trial by part, and the seconds of full depth without timers, outside and inside
    `generate`.
    """
    found: dict[str, list] = {name: [] for name in (*trials, "untimed", "generate")}
    never = trials["never"]
    calls = {name: partial(timed, model, states, one.script, one.exit_layers) for name, one in trials.items()}
    calls["untimed"] = partial(seconds_of, states, partial(walk, model, states, never.script, ()))
    calls["generate"] = partial(seconds_of, states, partial(generate, model, states, len(never.script.layers)))
    keep = {name: partial(_keep, found[name], call) for name, call in calls.items()}
    take_turns([keep] * (rounds + 1), Random(0), after_round)
    found = {name: each[1:] for name, each in found.items()}  # the first round warms up
    parts = (LAYERS, CROSS, SOURCE, CATCH_UP, HEADS, REST)
    by_part = {name: {part: median(one.get(part, 0.0) for one in found[name]) for part in parts} for name in trials}
    return by_part, {name: median(found[name]) for name in ("untimed", "generate")}


def _keep(found: list, call: Callable[[], Any]) -> None:
    found.append(call())


def generate(model: Any, states: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Full depth in `generate`, from the same encoder states."""
    mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "num_beams": 1, "do_sample": False}
    return model.generate(encoder_outputs=BaseModelOutput(states), attention_mask=mask, early_exit=False, **length)


def solve(
    trials: Mapping[str, Trial], parts: Mapping[str, Mapping[str, float]], whole: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of each kind of step, from the times of trials of known work.

    Args:
        trials: See `trials_for`.
        parts: Seconds of each trial by part.
        whole: Seconds of full depth without timers: `untimed`, the walk alone; `generate`, its loop included.
    """
    never, in_vain = parts["never"], parts["in vain"]
    steps, visits = trials["never"].work.steps, _times(trials["never"].work.rows)
    # Nearly all timers run at layers, so the cost of timing is subtracted there.
    timers = max(0.0, sum(never.values()) - whole["untimed"])
    layers = never[LAYERS] + never[CROSS] + never[CATCH_UP] - timers
    head = never[HEADS] / steps
    question = max(0.0, in_vain[REST] - never[REST]) / max(1, _times(trials["in vain"].work.questions))
    payment, position = _payments(trials, parts, lookup=never[CATCH_UP] / visits)
    return {
        "layer": layers / visits,
        "head": head,
        "question": question,
        "step": max(0.0, whole["generate"] - layers - never[HEADS] - never[SOURCE]) / steps,
        "departure": max(0.0, (parts["late"][REST] - never[REST]) / steps - question),
        "payment": payment,
        "position": position,
        "source": never[SOURCE] / int(trials["never"].work.newcomers.sum()),
    }


def _payments(trials: Mapping[str, Trial], parts: Mapping[str, Mapping[str, float]], lookup: float):
    """Seconds per backfill and per position in it: two trials, two unknowns.

    Args:
        lookup: Seconds of finding that no keys and values are missing.
    """
    names = [f"every {each}" for each in (SHORT, LONG)]
    works = [trials[name].work for name in names]
    counts = np.array([[_times(work.owed), work.owed.sum()] for work in works], dtype=float)
    unpaid = [_times(work.rows) - _times(work.owed) for work in works]
    seconds = [parts[name][CATCH_UP] - lookup * times for name, times in zip(names, unpaid, strict=True)]
    payment, position = np.linalg.lstsq(counts, np.array(seconds), rcond=None)[0]
    return max(0.0, float(payment)), max(0.0, float(position))


def _times(counts: np.ndarray) -> int:
    """How many counts are above 0."""
    return int((counts > 0).sum())
