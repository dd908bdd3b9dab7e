"""Pairs of input and target text, and the distinct inputs with all their references.

The unit of evaluation is the distinct input: an input that appears in several rows is one prompt with several
references. Where inputs depend on each other, such as questions about one text, the unit is a group of inputs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_earlyexit.common.tables import Table, read_file


if TYPE_CHECKING:
    from datasets import Dataset


__all__ = [
    "Example",
    "column_pairs",
    "data_fingerprint",
    "group_by_input",
    "hash_of_input",
    "read_examples",
    "read_file",
    "short_hash",
    "text_columns",
]


# Input and target columns of well-known data sets, in search order.
KNOWN_COLUMNS = (
    ("article", "highlights"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("text", "summary"),
    ("mr", "ref"),
    ("input", "target"),
)


@dataclass(frozen=True)
class Example:
    """A distinct input and its references, in the order of the rows.

    Attributes:
        source: The text that the model reads.
        references: Empty if there are none.
        group: Inputs with the same group are one unit. Empty: the input is a unit by itself.
    """

    source: str
    references: tuple[str, ...] = ()
    group: str = ""

    @property
    def unit(self) -> str:
        return self.group or self.source


def text_columns(names: Sequence[str], source: str | None = None, target: str | None = None) -> tuple[str, str]:
    """The columns of inputs and targets: the given ones, or the first pair of `KNOWN_COLUMNS` that exists.

    Raises:
        ValueError: A column does not exist, or no known pair does.
    """
    _check_columns(names, source, target)
    known = (pair for pair in KNOWN_COLUMNS if set(pair) <= set(names))
    known_source, known_target = next(known, (None, None))
    found = (source or known_source, target or known_target)
    if None in found:
        raise ValueError(
            f"Name the columns of input and target text: of {list(names)} it is not known which they are."
        )
    return found


def _check_columns(names: Sequence[str], *asked: str | None) -> None:
    for column in asked:
        if column is not None and column not in names:
            raise ValueError(f"There is no column {column!r}; there are {list(names)}.")


def group_by_input(pairs: Iterable[tuple[str, str]]) -> list[Example]:
    """The distinct inputs of `(input, target)` pairs, in order of first appearance."""
    references: dict[str, list[str]] = {}
    for source, target in pairs:
        references.setdefault(source, []).append(target)
    return [Example(source, tuple(targets)) for source, targets in references.items()]


def read_examples(
    dataset: Table | Dataset, source: str, target: str | None = None, *, prefix: str = "", group_by: str | None = None
) -> list[Example]:
    """The distinct inputs of a data set, for calibration.

    Args:
        dataset: Its rows, from a file (`read_file`) or from the library `datasets`.
        source: The column with the inputs.
        target: The column with one reference each; None: no references.
        prefix: Put before each input.
        group_by: The column whose value, with the prefix, gives the group of a row. Rows of a group with the same
            input are one input with several references. The group is the unit, however many inputs it has here.

    Raises:
        ValueError: A column does not exist, a cell is not a text, an input appears in several rows without `group_by`
            or in several groups, or a row has no group.
    """
    _check_columns(dataset.column_names, source, target, group_by)
    pairs = column_pairs(dataset, source, target or source, prefix)
    if group_by is None:
        groups = _refuse_duplicates([text for text, _ in pairs])
    else:  # with the prefix: rows grouped by their input give the same units as without groups
        groups = [prefix + label for label in group_labels(dataset, group_by)]
    references: dict[str, list[str]] = {}
    group_of: dict[str, str] = {}
    for (text, reference), group in zip(pairs, groups, strict=True):
        if group_of.setdefault(text, group) != group:
            raise ValueError(
                f"The input {text[:80]!r} stands in two groups of `group_by={group_by!r}`, {group_of[text]!r} and "
                f"{group!r}."
            )
        references.setdefault(text, []).append(reference)
    return [
        Example(text, tuple(found) if target else (), "" if group_of[text] == text else group_of[text])
        for text, found in references.items()
    ]


def units_have_several(examples: Sequence[Example]) -> bool:
    """Whether any unit has more than one input."""
    return len({one.unit for one in examples}) < len({one.source for one in examples})


def group_labels(dataset: Table | Dataset, column: str) -> list[str]:
    """The value of `column` in every row, as text.

    Raises:
        ValueError: A row has none.
    """
    labels = list(dataset[column])
    if missing := [row for row, label in enumerate(labels) if label is None or label == ""]:
        place = _place(dataset, missing[0])
        raise ValueError(f"{place} has no value in column {column!r}, which says what belongs together.")
    return list(map(str, labels))


def _refuse_duplicates(sources: Sequence[str]) -> Sequence[str]:
    text, count = Counter(sources).most_common(1)[0] if sources else ("", 0)
    if count > 1:
        raise ValueError(
            f"{len(sources) - len(set(sources))} of {len(sources)} rows repeat an input ({text[:80]!r} stands in "
            f"{count}), and rows that repeat it are not independent: name the column that says what belongs together, "
            "`group_by=`, such as that of the inputs."
        )
    return [""] * len(sources)


def short_hash(example: Example) -> str:
    """Hash of the input as 16 hexadecimal digits: identifies seen inputs without storing them."""
    return hash_of_input(example.source)


def hash_of_input(source: str) -> str:
    """Like `short_hash`, for the text of an input."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def data_fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 of inputs, references and groups, independent of their order."""
    each = sorted(repr((one.source, sorted(one.references), one.unit)) for one in examples)
    return hashlib.sha256("\n".join(each).encode()).hexdigest()


def column_pairs(dataset: Table | Dataset, source: str, target: str, prefix: str = "") -> list[tuple[str, str]]:
    """`(prefix + input, target)` of every row.

    Raises:
        ValueError: A cell is not a text; the message gives its place.
    """
    rows = list(zip(dataset[source], dataset[target], strict=True))
    for number, row in enumerate(rows):
        for column, text in zip((source, target), row, strict=True):
            if not isinstance(text, str):
                raise ValueError(f"{_place(dataset, number)} has no text in column {column!r}: {text!r}.")
    return [(prefix + text, reference) for text, reference in rows]


def _place(dataset: Table | Dataset, row: int) -> str:
    """The place of a row, for messages: file and line if it comes from a file."""
    return dataset.where(row) if isinstance(dataset, Table) else f"Row {row}"
