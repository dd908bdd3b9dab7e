"""Table of the losses of candidates on inputs (a row per unit, a column per candidate), and times against stock."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import T5ForConditionalGeneration

from hf_earlyexit.calibration.losses import Loss
from hf_earlyexit.calibration.risk_target import units_of
from hf_earlyexit.common.data import Example
from hf_earlyexit.common.output_files import written_beside
from hf_earlyexit.decoding.candidates import Candidate, full_depth
from hf_earlyexit.evaluation.generate_texts import Text, TextGenerator
from hf_earlyexit.families.t5.stock import stock_generate
from hf_earlyexit.speed.timing import clock_of, one_thread, take_turns


@dataclass(frozen=True)
class LossTable:
    """Losses of candidates on the inputs of a part.

    Attributes:
        candidates: The K candidates of the columns.
        units: The n units of the rows.
        losses: `[n, K]`, means over the inputs of a unit.
        layers: `[K]`, mean layers per token.
    """

    candidates: list[Candidate]
    units: list[str]
    losses: NDArray
    layers: NDArray

    @property
    def names(self) -> list[str]:
        return [candidate.name for candidate in self.candidates]

    def column(self, candidate: Candidate) -> NDArray:
        """`[n]`, the losses of one candidate."""
        return self.losses[:, self.names.index(candidate.name)]

    def of(self, candidates: Sequence[Candidate]) -> LossTable:
        """The table with the columns of these candidates only, in this order."""
        columns = [self.names.index(candidate.name) for candidate in candidates]
        return LossTable(list(candidates), self.units, self.losses[:, columns], self.layers[columns])

    def with_columns(self, others: Iterable[LossTable]) -> LossTable:
        """This table with columns replaced by those of other tables, whose columns are some of this one's."""
        losses = self.losses.copy()
        for other in others:
            losses[:, [self.names.index(name) for name in other.names]] = other.losses
        return LossTable(self.candidates, self.units, losses, self.layers)

    def of_curve(self, curve: str) -> LossTable:
        """The table with the columns of one curve only."""
        return self.of([candidate for candidate in self.candidates if candidate.curve == curve])

    def save(self, path: str | Path) -> None:
        """Write the table as CSV: one row per unit, one column per candidate."""
        with written_beside(path, newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["unit", *self.names])
            writer.writerows([unit, *row] for unit, row in zip(self.units, self.losses.tolist(), strict=True))


def record_losses(
    writer: TextGenerator,
    examples: Sequence[Example],
    candidates: Sequence[Candidate],
    loss: Loss,
    part: str,
    rows_per_batch: int | None = None,
    full: Sequence[Text] | None = None,
) -> LossTable:
    """Generate with full depth and with every candidate for all inputs, and compute the losses.

    Args:
        writer: Generator of the model; texts in its journal are not generated again.
        examples: The inputs.
        candidates: The columns.
        loss: The loss of an early-exit text.
        part: The name of these inputs in the journal.
        rows_per_batch: As in `units_of`.
        full: Full-depth texts to compare with, if not those of `writer`.

    Raises:
        ValueError: There is no input, or no whole batch.
    """
    labels = units_of(examples, rows_per_batch)
    examples = examples[: len(labels)]
    if not examples:
        least = f"one batch of {rows_per_batch}" if rows_per_batch else "one"
        raise ValueError(f"The {part} part has too few inputs: at least {least} must be there.")
    place_of = {unit: place for place, unit in enumerate(dict.fromkeys(labels))}
    row_of, units = [place_of[label] for label in labels], list(place_of)
    full = writer.write(examples, full_depth(), part).texts if full is None else full
    losses, layers = np.zeros((len(units), len(candidates))), np.zeros(len(candidates))
    for column, candidate in enumerate(tqdm(candidates, desc=f"{part}: candidates", unit="candidate", leave=False)):
        early = writer.write(examples, candidate, part).texts
        each = [loss.of(*pair, example.references) for *pair, example in zip(early, full, examples, strict=True)]
        np.add.at(losses[:, column], row_of, each)
        layers[column] = fmean(layer for text in early for layer in text.layers_run)
    sizes = np.bincount(row_of, minlength=len(units))
    return LossTable(list(candidates), units, losses / sizes[:, None], layers)


def times_beside_stock(
    writer: TextGenerator,
    stock: T5ForConditionalGeneration,
    examples: Sequence[Example],
    candidates: Sequence[Candidate],
    *,
    batch_size: int,
    rounds: int,
) -> list[float]:
    """Per candidate, the median time of `generate`, encoder included, relative to the stock model at full depth.

    The candidates and stock take turns on each of `rounds` batches, in one process and on one thread, after one
    warm-up batch. On a CPU, where other processes may be running, the clock is the process's own; elsewhere it is the
    wall clock.
    """
    whole = len(examples) // batch_size * batch_size or len(examples)
    batches = islice(cycle(writer.batches(examples[:whole], batch_size)), rounds + 1)
    names = [candidate.name for candidate in candidates]

    def calls(batch: dict[str, Any]) -> dict[str, Callable[[], Any]]:
        ours = {one.name: partial(writer.model.generate, **batch, **one.keywords) for one in candidates}
        return {"stock": partial(stock_generate, stock, **batch)} | ours

    with one_thread(), tqdm(total=rounds, desc="timing", unit="batch", leave=False) as progress:
        times = take_turns(map(calls, batches), Random(0), progress.update)
    clock = clock_of(writer.model.device.type)
    return [times.ratio(name, {"stock": 1.0}, clock)["median"] for name in names]
