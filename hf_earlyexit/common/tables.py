"""Read rows from CSV, TSV, JSON and Parquet files without conversion.

A cell of a delimited file is a text: `007`, `3.8`, `None` and `NA` are not converted. Cells of JSON and Parquet files
have the types given in the file. Paths are taken literally.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_earlyexit.common.json_text import decode, parse_json


DELIMITERS = {".csv": ",", ".tsv": "\t"}
QUOTING = "a cell that begins with a quote must end with one, and a quote inside it must be written twice"


@dataclass(frozen=True)
class Table:
    """The rows of a file.

    Attributes:
        path: Path of the file.
        records: The cells of each row, by column. A missing cell has no key.
        unit: Unit of the row numbers in messages: "line", "record" or "row".
        numbers: Number of each row in that unit, starting at 1.
    """

    path: str
    records: list[dict[str, Any]]
    unit: str
    numbers: Sequence[int]

    @property
    def column_names(self) -> list[str]:
        return list(dict.fromkeys(name for record in self.records for name in record))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, column: str) -> list[Any]:
        """The cells of a column; None where a row has none."""
        return [record.get(column) for record in self.records]

    def where(self, row: int) -> str:
        """File and place of a row, for messages; `row` counts from 0."""
        return f"{self.path}, {self.unit} {self.numbers[row]}"


def read_file(path: str | Path) -> Table:
    """Read a CSV, TSV, JSON or Parquet file; a further suffix `.gz` means compressed.

    A `.jsonl` file has an object on each line; a `.json` file has that or one list of objects.

    Raises:
        ValueError: The suffix is unknown, or the content does not match it. The message has the file, and the line
            where there is one.
        FileNotFoundError: The file does not exist.
        OSError: The file cannot be read.
    """
    path = str(path)
    suffix = suffix_of(path)
    if suffix not in READERS:
        raise ValueError(f"{path!r} must end in one of {list(READERS)}.")
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no file {path!r}.")
    table = READERS[suffix](content_of(path), path)
    if not table.records:
        raise ValueError(f"{path} has no rows")
    return table


def suffix_of(path: str) -> str:
    """The suffix that gives the format, such as `.csv` for `rows.CSV.gz`."""
    name = Path(path).name.lower()
    return Path(name.removesuffix(".gz")).suffix


def read_json_lines(text: str, path: str) -> Table:
    """The objects of JSON lines. Blank lines are skipped.

    Raises:
        ValueError: A line is not a JSON object; the message has its number.
    """
    lines = [(number, line.strip()) for number, line in enumerate(io.StringIO(text), 1) if line.strip()]
    found = [parse_json(line, f"{path}, line {number}") for number, line in lines]
    return _objects(found, path, "line", [number for number, _ in lines])


def content_of(path: str) -> bytes:
    """The bytes of a file, decompressed if its name ends in `.gz`.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not compressed, or is truncated.
    """
    content = Path(path).read_bytes()
    if not path.lower().endswith(".gz"):
        return content
    try:
        return gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error


def _objects(values: list[Any], path: str, unit: str, numbers: Sequence[int]) -> Table:
    for number, value in zip(numbers, values, strict=True):
        if not isinstance(value, dict):
            raise ValueError(f"{path}, {unit} {number}: a JSON object is expected, got {type(value).__name__}")
    return Table(path, values, unit, numbers)


# --- formats --------------------------------------------------------------------------------------------------------


def _delimited(content: bytes, path: str) -> Table:
    """Rows as a spreadsheet shows them: quoted cells may hold delimiters, quotes and line ends."""
    text, rows, line = decode(content, path), [], 1
    usual = csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[suffix_of(path)], strict=True)
        for cells in reader:
            if cells:
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: {QUOTING}") from error
    finally:
        csv.field_size_limit(usual)
    if not rows:
        raise ValueError(f"{path} is empty: a first line with the names of the columns is expected")
    (line, names), *rows = rows
    _refuse_repeated_names(names, f"{path}, line {line}")
    records = [_record(names, cells, f"{path}, line {number}") for number, cells in rows]
    return Table(path, records, "line", [number for number, _ in rows])


def _record(names: list[str], cells: list[str], where: str) -> dict[str, str]:
    """The cells by column name. Missing cells have no key; empty cells beyond the last column are ignored."""
    if any(cells[len(names) :]):
        raise ValueError(f"{where}: {len(cells)} cells under {len(names)} names: put cells with a delimiter in quotes")
    return {name: cell for name, cell in zip(names, cells, strict=False) if name}  # either may be longer


def _refuse_repeated_names(names: Sequence[str], where: str) -> None:
    if repeated := next((name for name in names if name and names.count(name) > 1), None):
        raise ValueError(f"{where}: two columns are named {repeated!r}: rename one")


def _json_lines(content: bytes, path: str) -> Table:
    return read_json_lines(decode(content, path), path)


def _json(content: bytes, path: str) -> Table:
    text = decode(content, path)
    if not text.lstrip().startswith("["):
        return read_json_lines(text, path)
    values = parse_json(text, path)
    return _objects(values, path, "record", range(1, len(values) + 1))


def _parquet(content: bytes, path: str) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(pyarrow.BufferReader(content))
        _refuse_repeated_names(table.column_names, path)
        records = table.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no Parquet file that can be read: {error}") from error
    return Table(path, records, "row", range(1, len(records) + 1))


READERS: dict[str, Callable[[bytes, str], Table]] = {
    ".csv": _delimited,
    ".tsv": _delimited,
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
