"""Tables are read with unchanged cells, or refused in one line that gives the error and its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from hf_earlyexit.cli.generate import read_records
from hf_earlyexit.common.data import read_examples, read_file


LOOKS = [
    "007",
    "3.8",
    "1.10",
    "1e5",
    "None",
    "NA",
    "nan",
    "",
    "True",
    "2020-01-02",
    " a ",
    "a\nb",
    'x "y"',
    "\u2028",
    "-0",
]


def as_csv(rows: list[list[str]], **how) -> str:
    """Rows as the standard library writes them."""
    stream = io.StringIO()
    csv.writer(stream, quoting=csv.QUOTE_ALL, **how).writerows(rows)
    return stream.getvalue()


@pytest.mark.parametrize("ends", ("\n", "\r\n", "\r"))
@pytest.mark.parametrize(("suffix", "delimiter"), ((".csv", ","), (".tsv", "\t"), (".CSV", ",")))
def test_cells_are_texts_whatever_they_look_like(tmp_path, suffix, delimiter, ends):
    rows = [["mr", "target"], *([f"text {number}", look] for number, look in enumerate(LOOKS))]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + as_csv(rows, delimiter=delimiter, lineterminator=ends).encode())
    table = read_file(path)
    assert (table.column_names, table["target"]) == (["mr", "target"], LOOKS)
    assert [one.references[0] for one in read_examples(table, "mr", "target")] == LOOKS
    assert [record["input"] for record in read_records(str(path), "target")] == LOOKS


@pytest.mark.parametrize("suffix", (".jsonl", ".json", ".jsonl.gz", ".parquet"))
def test_texts_of_json_and_parquet_stay_as_they_are(tmp_path, suffix):
    path, rows = tmp_path / f"rows{suffix}", [{"input": f"text {n}", "target": look} for n, look in enumerate(LOOKS)]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    assert read_file(path).records == rows
    if suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
        assert read_file(path).records == rows


def test_what_a_spreadsheet_shows(tmp_path):
    """Empty lines are skipped, missing cells have no key, and empty cells beyond the last column are ignored."""
    path = tmp_path / "rows.csv"
    path.write_text('input,,target\n\n"a,\n""b""",1,x,,\n"",2\nc,3,"y"\n')
    table = read_file(path)
    assert table.records == [{"input": 'a,\n"b"', "target": "x"}, {"input": ""}, {"input": "c", "target": "y"}]
    assert [table.where(row).rpartition(", ")[2] for row in range(3)] == ["line 3", "line 5", "line 6"]
    with pytest.raises(ValueError, match=r"rows\.csv, line 5 has no text in column 'target': None"):
        read_examples(table, "input", "target")


@pytest.mark.parametrize(
    "name",
    ("a*b.csv", "[ab].csv", "{a,b}.csv", " a b .csv", "~.csv", "-x.csv", "s3:x.csv", "é%20?#.csv", "$HOME.csv"),
)
def test_paths_are_taken_literally(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for other in ("aab.csv", "a.csv", "b.csv"):
        Path(other).write_text("input,target\nother,x\n")
    Path(name).write_text("input,target\nthis,x\n")
    assert read_file(name)["input"] == ["this"]
    assert read_records(name, "input") == [{"input": "this", "target": "x"}]
    Path("k=v").mkdir()
    parquet.write_table(pyarrow.table({"input": ["this"]}), f"k=v/{name}.parquet")
    assert read_file(f"k=v/{name}.parquet").records == [{"input": "this"}]


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    (
        ("latin.csv", "input,target\nCafé,Thé\n".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8: save the file"),
        ("wide.csv", "input,target\na,b\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        ("empty.csv", b"", "is empty: a first line with the names of the columns"),
        ("blank.csv", b"\n\n", "is empty"),
        ("head.csv", b"input,target\n", "has no rows"),
        ("open.csv", b'input,target\na,b\n"c,d\ne,f\n', "line 3: a cell that begins"),
        ("after.tsv", b'input\ttarget\n"a" b\tc\n', "line 2: a cell that begins"),
        ("long.csv", b"input,target\na,b\na, b, c\n", "line 3: 3 cells under 2 names"),
        ("twice.csv", b"input,input\na,b\n", "line 1: two columns are named 'input'"),
        ("bad.jsonl", b'{"a": 1}\n\n{"a": \n', "line 3: not JSON"),
        ("list.jsonl", b'["a"]\n', "line 1: a JSON object is expected, got list"),
        ("list.json", b'[{"a": 1}, 2]', "record 2: a JSON object is expected, got int"),
        ("cut.json", b'[{"a": 1},\n{"a": ', "line 2: not JSON"),
        (
            "twice.jsonl",
            b'{"a": "x", "a": "y"}\n',
            "line 1: not JSON that can be read (duplicate key 'a'",
        ),
        (
            "half.jsonl",
            b'{"a": "x"}\n{"a": ["\\ud83d"]}\n',
            "line 2: a text has \\ud83d, half of a pair",
        ),
        ("deep.jsonl", f'{{"a": {DEEP}}}'.encode(), "line 1: not JSON that can be read (nested too deep)"),
        ("digits.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1: not JSON that can be read (Exceeds the limit"),
        ("large.jsonl", b'{"a": 1e999}', "line 1: not JSON that can be read (the number 1e999 is too large)"),
        ("none.jsonl", b"", "has no rows"),
        ("torn.csv.gz", gzip.compress(b"input,target\n" * 9, mtime=0)[:-9], "is not a whole gzip file"),
        ("plain.csv.gz", b"input,target\na,b\n", "is not a whole gzip file"),
        ("text.parquet", b"input,target\n", "is no Parquet file that can be read"),
        ("none.parquet", b"", "is no Parquet file that can be read"),
        ("text.txt", b"a\n", "must end in one of"),
    ),
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as refused:
        read_file(path)
    assert message in str(refused.value) and str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_cells_may_be_long(tmp_path):
    path, limit = tmp_path / "rows.csv", csv.field_size_limit()
    path.write_text(f"input,target\n{'a' * 200_000},b\n")
    assert len(read_file(path)["input"][0]) == 200_000 and csv.field_size_limit() == limit


@pytest.mark.parametrize("named", (True, False))
def test_lines_of_a_text_stay_as_they_are(tmp_path, monkeypatch, named):
    """Includes leading and trailing spaces, and characters that only some programs treat as line ends."""
    lines = [" a ", "b\u2028c\x0bd\x85", "\xa0e", '"f"', "007"]
    content = ("\ufeff" + "\r\n \r\n".join(lines)).encode()
    if not named:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    (tmp_path / "inputs.txt").write_bytes(content)
    assert read_records(str(tmp_path / "inputs.txt") if named else "-", None) == [{"input": line} for line in lines]
