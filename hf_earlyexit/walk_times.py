"""Answers for measuring a `Roofline`: recorded exits walked with timers and without, beside the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import torch

from hf_earlyexit.compiling import CompileOptions
from hf_earlyexit.machine_rates import MachineRates
from hf_earlyexit.policies import CRITERIA, WITH_CANDIDATES
from hf_earlyexit.roofline import CROSS, LAYERS, DecoderSizes, Roofline, compare, parts_of, together
from hf_earlyexit.simulation import pieces_of, simulate
from hf_earlyexit.timed_walk import Replay, seconds_of, source_states, timed, walk
from hf_earlyexit.timing import take_turns


@dataclass
class WalkTimes:
    """Seconds of walks.

    Attributes:
        parts: By part, timers included.
        untimed: Of the same walks without timers.
    """

    parts: Counter[str] = field(default_factory=Counter)
    untimed: float = 0.0


def measure_roofline(
    model: Any,
    layers_run: Sequence[Sequence[int]],
    exit_layers: Sequence[int],
    criterion: str | None = None,
    *,
    batch_size: int = 1,
    source: int = 64,
    new_tokens: int = 48,
    rounds: int = 5,
    compiling: CompileOptions | None = None,
    after_round: Callable[[], Any] = int,
) -> tuple[Roofline, MachineRates, float]:
    """Measure a decoder beside the machine, at the thread count in force.

    Args:
        model: In eval mode.
        layers_run: Of every token of some texts, which are walked one behind the other, in pieces of `new_tokens`.
        exit_layers: Where tokens are asked.
        criterion: What they are asked; None: nothing.
        batch_size: Pieces walked at once.
        source: Positions of each row's source.
        new_tokens: Of each piece.
        rounds: Batches of pieces that are timed.
        compiling: Run compiled regions, in which layers and cross-attention are one part; the model must be prepared.
        after_round: Called after each.

    Returns:
        The comparison, the rates of the machine, and the mean layers of the tokens that were walked.
    """
    depth = model.config.num_decoder_layers
    scripts = pieces_of(layers_run, rounds, batch_size, new_tokens)
    walked = simulate(scripts, depth, exit_layers, scores=bool(exit_layers) and criterion in WITH_CANDIDATES)
    asked = CRITERIA[criterion]() if criterion and exit_layers else None
    states = source_states(model, batch_size, source)
    replays = [Replay(script, asked) for script in scripts]
    times = time_walks(model, states, replays, exit_layers, compiling, after_round)
    dtype = model.decoder_adapter.shape(model).dtype
    sizes = DecoderSizes.of(model.config, dtype.itemsize)
    rates = MachineRates.measure(sizes.weight_bytes, dtype, states.device)
    work = parts_of(sizes, walked, source)
    work = work if compiling is None else together(work, LAYERS, CROSS)
    return compare(work, rates, times.parts, times.untimed, walked.tokens), rates, walked.mean_layers


def time_walks(
    model: Any,
    states: torch.Tensor,
    replays: Sequence[Replay],
    exit_layers: Sequence[int],
    compiling: CompileOptions | None = None,
    after_round: Callable[[], Any] = int,
) -> WalkTimes:
    """Walk each script with timers and without, in random order; one of them beforehand, to warm up."""
    times = WalkTimes()
    rounds = calls_of_rounds(model, states, replays, exit_layers, times, compiling)
    take_turns(rounds, Random(0), after_round)
    return times


def calls_of_rounds(
    model: Any,
    states: torch.Tensor,
    replays: Sequence[Replay],
    exit_layers: Sequence[int],
    times: WalkTimes,
    compiling: CompileOptions | None = None,
) -> Iterator[dict[str, Callable[[], Any]]]:
    """The calls of each round; what those of the first one find is thrown away."""

    def with_timers(replay: Replay, into: WalkTimes) -> None:
        into.parts.update(timed(model, states, replay, exit_layers, compiling))

    def without(replay: Replay, into: WalkTimes) -> None:
        into.untimed += seconds_of(states, partial(walk, model, states, replay, exit_layers, None, compiling))

    for replay, into in [(replays[0], WalkTimes()), *((replay, times) for replay in replays)]:
        yield {"timed": partial(with_timers, replay, into), "untimed": partial(without, replay, into)}
