"""Answers for measuring a `TimeModel`: walks of known work are timed, and solved for what each kind of step takes.

Knows what work the trials are, from a simulation of them; whatever they write is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutput

from hf_earlyexit.policies import CRITERIA, WITH_CANDIDATES, ExitCriterion
from hf_earlyexit.roofline import CATCH_UP, CROSS, HEADS, LAYERS, REST, SOURCE
from hf_earlyexit.simulation import SimulatedWalk, simulate
from hf_earlyexit.time_model import TimeModel
from hf_earlyexit.timed_walk import Replay, seconds_of, source_states, timed, walk
from hf_earlyexit.timing import take_turns


SHORT, LONG = 2, 12  # every so many tokens one runs all layers: debts of 1 position, and of 11


@dataclass(frozen=True)
class Trial:
    """A walk that is timed for the model, again and again.

    Attributes:
        exit_layers: Where it asks.
        script: Where rows leave, and whom it asks.
        work: What it comes to.
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
    """Time what walks are made of. Takes `rounds` times about ten short texts for each number of rows.

    Args:
        model: In eval mode, with exit points.
        criterion: A name of `CRITERIA`, whose questions are timed.
        batch_size: Rows are timed at powers of two up to this, and at this.
        source: Positions of each row's source.
        new_tokens: Of each text.
        rounds: How often everything is timed; medians count.
        after_round: Called after each round; there are `rounds` for each number of rows.
    """
    rows = rows_to_time(batch_size)
    found = [_measure_at(model, criterion, count, source, new_tokens, rounds, after_round) for count in rows]
    by_rows = {name: tuple(one[name] for one in found) for name in ("layer", "head", "question", "step")}
    of_batch = {name: found[-1][name] for name in ("departure", "payment", "position", "source")}
    return TimeModel(criterion, criterion in WITH_CANDIDATES, rows, **by_rows, **of_batch)


def rows_to_time(batch_size: int) -> tuple[int, ...]:
    """Powers of two up to the batch's size, and that."""
    return (*(2**power for power in range(batch_size.bit_length()) if 2**power < batch_size), batch_size)


def rounds_in_all(batch_size: int, rounds: int) -> int:
    """How often `measure_time_model` calls `after_round`."""
    return rounds * len(rows_to_time(batch_size))


def _measure_at(model, criterion: str, rows: int, source: int, new_tokens: int, rounds: int, after_round) -> dict:
    """Everything at one number of rows."""
    states = source_states(model, rows, source)
    trials = trials_for(model, CRITERIA[criterion](), criterion in WITH_CANDIDATES, rows, new_tokens)
    parts, whole = _time(model, states, trials, rounds, after_round)
    return solve(trials, parts, whole)


def trials_for(model: Any, asked: ExitCriterion, scores: bool, rows: int, new_tokens: int) -> dict[str, Trial]:
    """Walks of known work: nobody asked; asked everywhere in vain; every other row leaves, so late
    that little else changes; debts paid young, and old."""
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
    """Medians over rounds: seconds of each trial by part; seconds of full depth without timers, in and out of
    `generate`."""
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
    """Full depth in `generate`, behind the same encoder states."""
    mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "num_beams": 1, "do_sample": False}
    return model.generate(encoder_outputs=BaseModelOutput(states), attention_mask=mask, early_exit=False, **length)


def solve(
    trials: Mapping[str, Trial], parts: Mapping[str, Mapping[str, float]], whole: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of each kind of step, of the times of trials of known work.

    Args:
        trials: See `trials_for`.
        parts: Seconds of each trial by part.
        whole: Seconds of full depth without timers: `untimed`, the walk alone; `generate`, its loop included.
    """
    never, in_vain = parts["never"], parts["in vain"]
    steps, visits = trials["never"].work.steps, _times(trials["never"].work.rows)
    # Nearly all timers run at layers, so that what timing costs is taken off there.
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
    """Seconds per payment, and per position in it: two trials, two unknowns.

    Args:
        lookup: Seconds of finding that nothing is owed.
    """
    names = [f"every {each}" for each in (SHORT, LONG)]
    works = [trials[name].work for name in names]
    counts = np.array([[_times(work.owed), work.owed.sum()] for work in works], dtype=float)
    unpaid = [_times(work.rows) - _times(work.owed) for work in works]
    seconds = [parts[name][CATCH_UP] - lookup * times for name, times in zip(names, unpaid, strict=True)]
    payment, position = np.linalg.lstsq(counts, np.array(seconds), rcond=None)[0]
    return max(0.0, float(payment)), max(0.0, float(position))


def _times(counts: np.ndarray) -> int:
    """How often there was any."""
    return int((counts > 0).sum())
