"""Hypothesis strategies for files with arbitrary content, and for well-formed texts."""

from __future__ import annotations

import csv
import gzip
import io
import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from hf_earlyexit.common.tables import READERS


FEW, MANY = 15, 2000
ENCODINGS = ("utf-8", "utf-8-sig", "latin-1", "utf-16", "cp1252")
NAMES = some.sampled_from(("input", "target", "text", "mr", "ref", "", " input", "id", "output"))
TEXTS = some.text(max_size=12) | some.sampled_from(
    (
        "007",
        "3.8",
        "None",
        "NA",
        "",
        '"',
        'a"b',
        "a,b",
        "a\tb",
        "a\r\nb",
        "\ufeff",
        "\u2028",
        "\x00",
        "é",
        "\ud83d",
        "{",
        "[",
    )
)
SCALARS = some.none() | some.booleans() | some.integers() | some.floats() | TEXTS
VALUES = some.recursive(
    SCALARS,
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(NAMES | TEXTS, inner, max_size=3),
    max_leaves=8,
)
RECORDS = some.lists(some.dictionaries(NAMES, VALUES, max_size=4), max_size=4)
ROWS = some.lists(some.lists(TEXTS, max_size=4), max_size=5)


def as_delimited(rows, delimiter: str, quoting: int, ends: str) -> str:
    stream = io.StringIO()
    try:
        csv.writer(stream, delimiter=delimiter, quoting=quoting, lineterminator=ends, escapechar="\\").writerows(rows)
    except csv.Error:  # one empty cell, unquoted
        return ""
    return stream.getvalue()


DELIMITED = some.builds(
    as_delimited,
    ROWS,
    some.sampled_from((",", "\t", ";")),
    some.sampled_from((csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONE)),
    some.sampled_from(("\n", "\r\n", "\r")),
)
JSON = some.builds(json.dumps, VALUES | RECORDS, ensure_ascii=some.booleans())
JSON_LINES = some.builds(
    lambda records, ends: ends.join(map(json.dumps, records)), RECORDS, some.sampled_from(("\n", "\r\n", "\n\n"))
)
WRITTEN = some.builds(
    lambda text, encoding, cut: text.encode(encoding, errors="replace")[: cut or None],
    DELIMITED | JSON | JSON_LINES | TEXTS,
    some.sampled_from(ENCODINGS),
    some.just(0) | some.integers(1, 40),
)
ZIPPED = WRITTEN.map(lambda content: gzip.compress(content, mtime=0))
CONTENTS = some.binary(max_size=60) | WRITTEN | ZIPPED | ZIPPED.map(lambda content: content[:-3])

PROPER = some.text(some.characters(exclude_categories=("Cs",)), max_size=12)
LINES = PROPER.map(lambda text: text.translate({10: None, 13: None, 0xFEFF: None})).filter(str.strip)
SUFFIXES = some.sampled_from((*READERS, *(f"{one}.gz" for one in READERS), ".txt", ".txt.gz"))

ROWS_OF_TEXTS = some.lists(some.tuples(PROPER, PROPER).map(list), min_size=1, max_size=4)
TABLES = {
    "rows": ROWS_OF_TEXTS,
    "quoting": some.sampled_from((csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC)),
    "ends": some.sampled_from(("\n", "\r\n", "\r")),
    "suffix": some.sampled_from((".csv", ".tsv")),
}


def try_many(trial, values, folder, count: int) -> None:
    """Call `trial(folder, **values)` for `count` drawn values."""
    how = settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    how(given(**values)(lambda **drawn: trial(folder, **drawn)))()
