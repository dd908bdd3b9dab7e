"""Answers for the table of what candidates lose on inputs, and what they cost: rows are units, columns candidates."""

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

from hf_earlyexit.candidates import Candidate, full_depth
from hf_earlyexit.data import Example
from hf_earlyexit.losses import Loss
from hf_earlyexit.output_files import written_beside
from hf_earlyexit.promise import units_of
from hf_earlyexit.stock import stock_generate
from hf_earlyexit.timing import clock_of, one_thread, take_turns
from hf_earlyexit.writing import Text, Writer


@dataclass(frozen=True)
class LossTable:
    """What some candidates lose on the inputs of a part.

    Attributes:
        candidates: Of the columns, K of them.
        units: Of the rows, n of them.
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
        """`[n]`."""
        return self.losses[:, self.names.index(candidate.name)]

    def of(self, candidates: Sequence[Candidate]) -> LossTable:
        """The columns of some candidates, in their order."""
        columns = [self.names.index(candidate.name) for candidate in candidates]
        return LossTable(list(candidates), self.units, self.losses[:, columns], self.layers[columns])

    def with_columns(self, others: Iterable[LossTable]) -> LossTable:
        """This table with the losses that tables of some of its columns have."""
        losses = self.losses.copy()
        for other in others:
            losses[:, [self.names.index(name) for name in other.names]] = other.losses
        return LossTable(self.candidates, self.units, losses, self.layers)

    def of_curve(self, curve: str) -> LossTable:
        """The columns of a curve."""
        return self.of([candidate for candidate in self.candidates if candidate.curve == curve])

    def save(self, path: str | Path) -> None:
        """Write it as CSV: a row for each unit, a column for each candidate."""
        with written_beside(path, newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["unit", *self.names])
            writer.writerows([unit, *row] for unit, row in zip(self.units, self.losses.tolist(), strict=True))


def record_losses(
    writer: Writer,
    examples: Sequence[Example],
    candidates: Sequence[Candidate],
    loss: Loss,
    part: str,
    rows_per_batch: int | None = None,
    full: Sequence[Text] | None = None,
) -> LossTable:
    """Let full depth and every candidate write for all inputs, and compare.

    Args:
        writer: Of the model; what it has in its journal is not written again.
        examples: The inputs.
        candidates: The columns.
        loss: What is compared.
        part: The name of these inputs in the journal.
        rows_per_batch: As in `units_of`.
        full: Full depth's texts, if another writer's are to be compared with.

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
    writer: Writer,
    stock: T5ForConditionalGeneration,
    examples: Sequence[Example],
    candidates: Sequence[Candidate],
    *,
    batch_size: int,
    rounds: int,
) -> list[float]:
    """Of each candidate the time of `generate`, encoder included, over that of stock at full depth; medians.

    All take turns on each of `rounds` batches, in one process and on one thread, after one that warms up. The clock is
    the process's on a CPU, where others may be at work, and the wall's elsewhere.
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
