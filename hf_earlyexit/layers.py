"""Answers for the walk through the decoder.

`run_layers` is the walk: catch up, run the block, ask, park. It is the only implementation: all that generates calls
it. What it takes to run and project one layer of a family is the family's adapter's, a `Decoder` (`t5.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

import torch
from torch import nn

from hf_earlyexit.cache import EarlyExitCache
from hf_earlyexit.policies import ExitCriterion, ExitPoint
from hf_earlyexit.rows import Rows
from hf_earlyexit.run import ExitRun
from hf_earlyexit.transfer import take


class DecoderShape(NamedTuple):
    """The size of a decoder's keys and values."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype


class Decoder(Protocol):
    """What the walk needs of a family. One adapter is made per `generate` call and holds what is constant in it."""

    num_layers: int
    # Whether `lm_head_rows` can be asked; where the head must be called as a module, all of it is.
    scores_rows: bool

    @staticmethod
    def shape(model: nn.Module) -> DecoderShape:
        """What a cache for `model` must fit."""

    def no_logits(self, batch_size: int) -> torch.Tensor:
        """Zeros `[batch, 1, vocabulary]`."""

    def embed(self, ids: torch.Tensor, rows: Rows) -> torch.Tensor:
        """`[rows, length, hidden]`, the first block's input for these rows of `ids [batch, length]`."""

    def begin_step(self, rows: Rows, cache: EarlyExitCache, length: int) -> None:
        """Prepare what the layers of one step share (masks, relative bias) for `length` positions behind the cache."""

    def begin_prompt(self, rows: Rows, cache: EarlyExitCache, length: int) -> None:
        """As `begin_step`, for positions that `run_block` runs."""

    def look_ahead(self, ids: torch.Tensor, rows: Rows, cache: EarlyExitCache) -> None:
        """Enqueue what the next step of `rows` needs if all go on, while the device is still busy with this one.

        Args:
            ids: `[batch]`, the tokens just chosen.
        """

    def expect(self, criterion: ExitCriterion, exit_points: Collection[int]) -> None:
        """The criterion of the call and where it is evaluated, for adapters that do so together with the layers."""

    def answer(self, layer: int, rows: Rows) -> Answer | None:
        """What the criterion says of the rows that `run_blocks` has just taken through `layer`, if it was evaluated
        there."""

    def run_block(self, layer: int, hidden: torch.Tensor, rows: Rows, cache: EarlyExitCache) -> torch.Tensor:
        """`[rows, length, hidden]`, the block's output; writes the rows' keys and values."""

    def run_blocks(
        self, layers: range, hidden: torch.Tensor, rows: Rows, cache: EarlyExitCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs `[rows, 1, hidden]` of the last of these blocks and of the one before it; writes as
        `run_block`."""

    def project(self, layer: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[positions, heads, head]` that `layer` makes of `states [positions, hidden]`."""

    def project_layers(self, layers: range, states: torch.Tensor) -> torch.Tensor:
        """Keys and values `[2, layers, positions, heads, head]` that these last layers make of `states`."""

    def head_input(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the LM head sees of `hidden [rows, hidden]` when it leaves after `layer`."""

    def lm_head(self, head_input: torch.Tensor) -> torch.Tensor:
        """`[rows, vocabulary]`."""

    def lm_head_rows(self, head_input: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """`[rows, candidates]`, what `lm_head` says of the tokens `ids [rows, candidates]`, each row of its own."""

    def exit_probability(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """`[rows]`, the exit classifier on `hidden [rows, hidden]`."""


class Answer(NamedTuple):
    """What a criterion said: a confidence per row, and the logits `[rows, vocabulary]` if it looked at them."""

    confidences: list[float]
    logits: torch.Tensor | None


class Departure(NamedTuple):
    """Rows that left the decoder after `layer` with `hidden [rows, hidden]`, and their logits if already known."""

    rows: Rows
    layer: int
    hidden: torch.Tensor
    logits: torch.Tensor | None


def decode_step(decoder: Decoder, ids: torch.Tensor, cache: EarlyExitCache, run: ExitRun) -> torch.Tensor:
    """Logits `[batch, 1, vocabulary]` of the token behind `ids [batch, length]`; zeros for rows that have ended.

    Of a prompt only the last position may leave early; the others run every layer.
    """
    rows = run.begin_step(ids.shape[1])
    if not rows:  # where the library looks a step late whether all have ended
        return decoder.no_logits(run.batch_size)
    if ids.shape[1] > 1:
        run_prompt(decoder, ids[:, :-1], cache, run, rows)
    cache.reserve(rows)
    decoder.begin_step(rows, cache, 1)
    departures = run_layers(decoder, decoder.embed(ids[:, -1:], rows), cache, run, rows)
    logits = gather_logits(decoder, departures, run)
    run.see_logits(logits)
    return logits


def run_layers(
    decoder: Decoder, hidden: torch.Tensor, cache: EarlyExitCache, run: ExitRun, rows: Rows
) -> list[Departure]:
    """Walk one position of `rows` through the decoder, each row as deep as it goes.

    Args:
        hidden: `[rows, 1, hidden]`, embeddings; the cache has room for them and the decoder has begun the step.
    """
    started, departures = rows, []
    for stretch in stretches(decoder.num_layers, run.exit_points):
        if cache.lacks(stretch[-1], rows):  # what a layer has of a row, the layers below it have, too
            for layer in stretch:
                run.work.filled_positions[layer] += cache.catch_up(layer, rows, decoder.project)  # a debt is paid here
        hidden, previous = decoder.run_blocks(stretch, hidden, rows, cache)
        for layer in stretch:
            run.work.layer_rows[layer] += len(rows)
        layer = stretch[-1]
        if layer == decoder.num_layers:
            break
        point = exit_point(decoder, layer, hidden, previous, rows, cache, run)
        leaving = run.leavers(point)  # a token leaves here
        if not leaving:
            continue
        for departure in depart(point, rows, leaving):
            departures.append(departure)
            owe(decoder, departure, cache, run)
        staying = sorted(set(range(len(rows))) - set(leaving))
        rows, hidden = rows.choose(staying), take(hidden, staying)
        if not staying:
            break
    if rows:
        departures.append(Departure(rows, decoder.num_layers, hidden[:, 0], None))
        for row in rows:
            run.record(row, decoder.num_layers)
    cache.advance(started)
    return departures


def stretches(num_layers: int, exit_points: Collection[int]) -> list[range]:
    """The layers, counted from 1, in stretches that end where someone is asked, or at the last layer."""
    ends = sorted({*exit_points, num_layers})
    return [range(start + 1, end + 1) for start, end in zip([0, *ends], ends, strict=False)]


def run_prompt(decoder: Decoder, ids: torch.Tensor, cache: EarlyExitCache, run: ExitRun, rows: Rows) -> None:
    """Run the positions of a decoder prompt that no token comes from through every layer."""
    length = ids.shape[1]
    cache.reserve(rows, length)
    decoder.begin_prompt(rows, cache, length)
    hidden = decoder.embed(ids, rows)
    for layer in range(1, decoder.num_layers + 1):
        hidden = decoder.run_block(layer, hidden, rows, cache)
        run.work.layer_rows[layer] += len(rows) * length
    cache.advance(rows, length)


def owe(decoder: Decoder, departure: Departure, cache: EarlyExitCache, run: ExitRun) -> None:
    """What rows that leave owe the layers above: parked for later, or with `fill="eager"` paid at once."""
    if cache.fill == "lazy":
        return cache.park(departure.rows, departure.hidden)
    layers = range(departure.layer + 1, decoder.num_layers + 1)
    cache.write_layers(layers, departure.rows, decoder.project_layers(layers, departure.hidden))
    for layer in layers:
        run.work.filled_positions[layer] += len(departure.rows)


def exit_point(
    decoder: Decoder,
    layer: int,
    hidden: torch.Tensor,
    previous: torch.Tensor,
    rows: Rows,
    cache: EarlyExitCache,
    run: ExitRun,
) -> ExitPoint:
    """What a criterion may look at after `layer`, with scores that are counted when they are computed."""

    def score(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        run.work.head_rows[layer] += len(hidden)
        return decoder.lm_head(decoder.head_input(layer, hidden))

    def score_some(layer: int, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        run.work.candidate_rows[layer] += ids.numel()
        return decoder.lm_head_rows(decoder.head_input(layer, hidden), ids)

    positions = [cache.lengths[row] for row in rows]
    states, classify = (hidden[:, 0], previous[:, 0]), decoder.exit_probability
    some = score_some if decoder.scores_rows else None
    point = ExitPoint(layer, rows.indices, positions, *states, score, classify, some, run.shortlist, run.streaks)
    if (answer := decoder.answer(layer, rows)) is not None:
        point.answer = answer.confidences
        if answer.logits is not None:
            point.logits = answer.logits
            run.work.head_rows[layer] += len(rows)
    return point


def depart(point: ExitPoint, rows: Rows, leaving: list[int]) -> list[Departure]:
    """The rows at the places `leaving`, with what is known of them; those without logits apart from those with."""
    return [
        Departure(
            rows if len(places) == len(rows) else rows.choose(places),
            point.layer,
            take(point.hidden, places),
            logits,
        )
        for places, logits in point.known_logits(leaving)
    ]


def gather_logits(decoder: Decoder, departures: list[Departure], run: ExitRun) -> torch.Tensor:
    """Every row's logits from the layer it left at: those known, and one vocabulary projection for all others."""
    unknown = [departure for departure in departures if departure.logits is None]
    scored = [(departure.rows, departure.logits) for departure in departures if departure.logits is not None]
    if unknown:
        inputs = [decoder.head_input(departure.layer, departure.hidden) for departure in unknown]
        logits = decoder.lm_head(torch.cat(inputs) if len(inputs) > 1 else inputs[0])
        for departure, part in zip(unknown, logits.split([len(departure.rows) for departure in unknown]), strict=True):
            run.work.head_rows[departure.layer] += len(departure.rows)
            scored.append((departure.rows, part))
    first_rows, first_logits = scored[0]
    if first_rows.is_everyone:
        return first_logits[:, None]
    gathered = first_logits.new_zeros(run.batch_size, first_logits.shape[-1])
    for rows, logits in scored:
        rows.place(gathered, logits)
    return gathered[:, None]
