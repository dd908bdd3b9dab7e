"""The walk through the decoder layers.

`run_layers` backfills missing keys and values, runs the blocks, evaluates the exit and keeps hidden states. It is the
only implementation; all generation calls it. A model family's adapter, a `Decoder` (`families/t5/decoder.py`), runs
and projects single layers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

import torch
from torch import nn

from hf_earlyexit.common.transfer import take
from hf_earlyexit.decoding.cache import EarlyExitCache
from hf_earlyexit.decoding.run import ExitRun
from hf_earlyexit.exits.criteria import ExitCriterion, ExitPoint
from hf_earlyexit.kernels.rows import Rows


class DecoderShape(NamedTuple):
    """The size of a decoder's keys and values."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype


class Decoder(Protocol):
    """The interface of a model family's adapter. One adapter is made per `generate` call and holds its constants."""

    num_layers: int
    # Whether `lm_head_rows` can be used. If the head must be called as a module, the whole head is evaluated.
    scores_rows: bool

    @staticmethod
    def shape(model: nn.Module) -> DecoderShape:
        """The size of a cache for `model`."""

    def no_logits(self, batch_size: int) -> torch.Tensor:
        """Zeros `[batch, 1, vocabulary]`."""

    def embed(self, ids: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The first block's input `[rows, length, hidden]` for these rows of `ids [batch, length]`."""

    def begin_step(self, rows: Rows, cache: EarlyExitCache, length: int) -> None:
        """Prepare masks and relative bias, shared by all layers of a step, for `length` positions after the cache."""

    def begin_prompt(self, rows: Rows, cache: EarlyExitCache, length: int) -> None:
        """Like `begin_step`, for positions that go through `run_block`."""

    def look_ahead(self, ids: torch.Tensor, rows: Rows, cache: EarlyExitCache) -> None:
        """Enqueue device work for the next step of `rows`, assuming that all continue, while this step still runs.

        Args:
            ids: `[batch]`, the tokens just chosen.
        """

    def expect(self, criterion: ExitCriterion, exit_points: Collection[int]) -> None:
        """Set the criterion and exit points of the call, for adapters that evaluate exits together with the layers."""

    def answer(self, layer: int, rows: Rows) -> Answer | None:
        """The exit evaluation of `rows` after `layer`, if the last `run_blocks` included it; else None."""

    def run_block(self, layer: int, hidden: torch.Tensor, rows: Rows, cache: EarlyExitCache) -> torch.Tensor:
        """The block's output `[rows, length, hidden]`; writes the rows' keys and values."""

    def run_blocks(
        self, layers: range, hidden: torch.Tensor, rows: Rows, cache: EarlyExitCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs `[rows, 1, hidden]` of the last of these blocks and of the block before it.

        Writes keys and values like `run_block`.
        """

    def project(self, layer: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[positions, heads, head]` of `layer` for `states [positions, hidden]`."""

    def project_layers(self, layers: range, states: torch.Tensor) -> torch.Tensor:
        """Keys and values `[2, layers, positions, heads, head]` of `layers`, the decoder's last, for `states`."""

    def head_input(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The LM head's input for `hidden [rows, hidden]` that exits after `layer`."""

    def lm_head(self, head_input: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, vocabulary]`."""

    def lm_head_rows(self, head_input: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The logits `[rows, candidates]` of `lm_head` for the tokens `ids [rows, candidates]` of each row."""

    def exit_probability(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The exit classifier's probability `[rows]` for `hidden [rows, hidden]`."""


class Answer(NamedTuple):
    """An evaluated exit: a confidence per row, and the logits `[rows, vocabulary]` if they were computed."""

    confidences: list[float]
    logits: torch.Tensor | None


class ExitedRows(NamedTuple):
    """Rows that exited after `layer` with `hidden [rows, hidden]`, and their logits if already computed."""

    rows: Rows
    layer: int
    hidden: torch.Tensor
    logits: torch.Tensor | None


def decode_step(decoder: Decoder, ids: torch.Tensor, cache: EarlyExitCache, run: ExitRun) -> torch.Tensor:
    """Logits `[batch, 1, vocabulary]` of the token after `ids [batch, length]`; zeros for finished rows.

    In a prompt, only the last position may exit early; the others run every layer.
    """
    rows = run.begin_step(ids.shape[1])
    if not rows:  # the library may check one step late whether all rows have finished
        return decoder.no_logits(run.batch_size)
    if ids.shape[1] > 1:
        run_prompt(decoder, ids[:, :-1], cache, run, rows)
    cache.reserve(rows)
    decoder.begin_step(rows, cache, 1)
    exited = run_layers(decoder, decoder.embed(ids[:, -1:], rows), cache, run, rows)
    logits = gather_logits(decoder, exited, run)
    run.see_logits(logits)
    return logits


def run_layers(
    decoder: Decoder, hidden: torch.Tensor, cache: EarlyExitCache, run: ExitRun, rows: Rows
) -> list[ExitedRows]:
    """Run one position of `rows` through the decoder, each row up to its exit.

    Args:
        hidden: `[rows, 1, hidden]`, embeddings. The cache must have room for them, and `decoder.begin_step` must have
            been called.
    """
    started, exited = rows, []
    for segment in segments(decoder.num_layers, run.exit_points):
        if cache.lacks(segment[-1], rows):  # positions filled at a layer are filled at all layers below it
            for layer in segment:
                # missing keys and values are filled here
                run.work.filled_positions[layer] += cache.backfill(layer, rows, decoder.project)
        hidden, previous = decoder.run_blocks(segment, hidden, rows, cache)
        for layer in segment:
            run.work.layer_rows[layer] += len(rows)
        layer = segment[-1]
        if layer == decoder.num_layers:
            break
        point = exit_point(decoder, layer, hidden, previous, rows, cache, run)
        leaving = run.exiting(point)  # the exit decision
        if not leaving:
            continue
        for one in exited_rows(point, rows, leaving):
            exited.append(one)
            fill_or_keep(decoder, one, cache, run)
        staying = sorted(set(range(len(rows))) - set(leaving))
        rows, hidden = rows.choose(staying), take(hidden, staying)
        if not staying:
            break
    if rows:
        exited.append(ExitedRows(rows, decoder.num_layers, hidden[:, 0], None))
        for row in rows:
            run.record(row, decoder.num_layers)
    cache.advance(started)
    return exited


def segments(num_layers: int, exit_points: Collection[int]) -> list[range]:
    """The layers, counted from 1, in segments that end at an exit point or at the last layer."""
    ends = sorted({*exit_points, num_layers})
    return [range(start + 1, end + 1) for start, end in zip([0, *ends], ends, strict=False)]


def run_prompt(decoder: Decoder, ids: torch.Tensor, cache: EarlyExitCache, run: ExitRun, rows: Rows) -> None:
    """Run the decoder prompt without its last position through every layer; these positions produce no token."""
    length = ids.shape[1]
    cache.reserve(rows, length)
    decoder.begin_prompt(rows, cache, length)
    hidden = decoder.embed(ids, rows)
    for layer in range(1, decoder.num_layers + 1):
        hidden = decoder.run_block(layer, hidden, rows, cache)
        run.work.layer_rows[layer] += len(rows) * length
    cache.advance(rows, length)


def fill_or_keep(decoder: Decoder, one: ExitedRows, cache: EarlyExitCache, run: ExitRun) -> None:
    """For exited rows, keep the hidden states (`fill="lazy"`) or fill the layers above at once (`fill="eager"`)."""
    if cache.fill == "lazy":
        return cache.keep(one.rows, one.hidden)
    layers = range(one.layer + 1, decoder.num_layers + 1)
    cache.write_layers(layers, one.rows, decoder.project_layers(layers, one.hidden))
    for layer in layers:
        run.work.filled_positions[layer] += len(one.rows)


def exit_point(
    decoder: Decoder,
    layer: int,
    hidden: torch.Tensor,
    previous: torch.Tensor,
    rows: Rows,
    cache: EarlyExitCache,
    run: ExitRun,
) -> ExitPoint:
    """The input of a criterion after `layer`; scores are counted in `run.work` when they are computed."""

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


def exited_rows(point: ExitPoint, rows: Rows, leaving: list[int]) -> list[ExitedRows]:
    """The exiting rows, given by their indices in `rows`, grouped by whether their logits are known."""
    return [
        ExitedRows(
            rows if len(places) == len(rows) else rows.choose(places),
            point.layer,
            take(point.hidden, places),
            logits,
        )
        for places, logits in point.known_logits(leaving)
    ]


def gather_logits(decoder: Decoder, exited: list[ExitedRows], run: ExitRun) -> torch.Tensor:
    """Every row's logits at its exit layer; one vocabulary projection computes all that are not known yet."""
    unknown = [one for one in exited if one.logits is None]
    scored = [(one.rows, one.logits) for one in exited if one.logits is not None]
    if unknown:
        inputs = [decoder.head_input(one.layer, one.hidden) for one in unknown]
        logits = decoder.lm_head(torch.cat(inputs) if len(inputs) > 1 else inputs[0])
        for one, part in zip(unknown, logits.split([len(one.rows) for one in unknown]), strict=True):
            run.work.head_rows[one.layer] += len(one.rows)
            scored.append((one.rows, part))
    first_rows, first_logits = scored[0]
    if first_rows.is_everyone:
        return first_logits[:, None]
    gathered = first_logits.new_zeros(run.batch_size, first_logits.shape[-1])
    for rows, logits in scored:
        rows.place(gathered, logits)
    return gathered[:, None]
