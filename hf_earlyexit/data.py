"""Answers for pairs of input and target text: reading them, and the distinct inputs with all their references.

The unit of evaluation is the distinct input: an input that stands in several rows is one prompt with several
references, not several prompts. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset


# Input and target columns of well-known data sets, in the order in which they are looked for.
KNOWN_COLUMNS = (
    ("article", "highlights"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("text", "summary"),
    ("mr", "ref"),
    ("input", "target"),
)
BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Example:
    """A distinct input and its references, in the order of the rows."""

    source: str
    references: tuple[str, ...]


def read_file(path: str) -> Dataset:
    """The rows of a CSV, TSV, JSON-lines (`.jsonl`, `.json`) or Parquet file; `.gz` behind that means compressed.

    Raises:
        ValueError: The name ends otherwise.
        FileNotFoundError: There is no such file.
    """
    suffix = Path(path.removesuffix(".gz")).suffix
    if suffix not in BUILDERS:
        raise ValueError(f"{path!r} must end in one of {list(BUILDERS)}.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path!r}.")
    options = {"delimiter": "\t"} if suffix == ".tsv" else {}
    return load_dataset(BUILDERS[suffix], data_files=path, split="train", **options)


def text_columns(names: Sequence[str], source: str | None = None, target: str | None = None) -> tuple[str, str]:
    """The columns with the inputs and the targets: those asked for, or the first of `KNOWN_COLUMNS` that are there.

    Raises:
        ValueError: A column is not there, or none is known.
    """
    for column in (source, target):
        if column is not None and column not in names:
            raise ValueError(f"There is no column {column!r}; there are {list(names)}.")
    known = (pair for pair in KNOWN_COLUMNS if set(pair) <= set(names))
    known_source, known_target = next(known, (None, None))
    found = (source or known_source, target or known_target)
    if None in found:
        raise ValueError(
            f"Name the columns of input and target text: of {list(names)} it is not known which they are."
        )
    return found


def group_by_input(pairs: Iterable[tuple[str, str]]) -> list[Example]:
    """The distinct inputs of `(input, target)` pairs, in the order in which they first appear."""
    references: dict[str, list[str]] = {}
    for source, target in pairs:
        references.setdefault(source, []).append(target)
    return [Example(source, tuple(targets)) for source, targets in references.items()]


def halves(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Two halves, one to choose settings on and one to report: the same for the same inputs, in whatever order."""
    ordered = sorted(examples, key=lambda example: hashlib.sha256(example.source.encode()).digest())
    middle = len(ordered) // 2
    return ordered[:middle], ordered[middle:]


def column_pairs(dataset: Dataset, source: str, target: str, prefix: str = "") -> list[tuple[str, str]]:
    """`(prefix + input, target)` of every row.

    Raises:
        ValueError: A cell is no text; the message says which.
    """
    rows: list[tuple[Any, Any]] = list(zip(dataset[source], dataset[target]))
    for number, row in enumerate(rows):
        for column, text in zip((source, target), row):
            if not isinstance(text, str):
                raise ValueError(f"Row {number} has no text in column {column!r}: {text!r}.")
    return [(prefix + text, reference) for text, reference in rows]
