"""Reading pairs of texts, and the distinct inputs among them."""

from __future__ import annotations

import gzip
import json

import pytest

from hf_earlyexit.data import Example, column_pairs, group_by_input, halves, read_file, text_columns


ROWS = [{"mr": "a", "ref": "one"}, {"mr": "b, c", "ref": "two"}, {"mr": "a", "ref": "three"}]


def write(path, rows):
    """The rows in the format that the name says."""
    mark = {".csv": ",", ".tsv": "\t"}.get(path.suffixes[0])
    lines = map(json.dumps, rows)
    if mark:
        lines = [mark.join(rows[0]), *(mark.join(f'"{text}"' for text in row.values()) for row in rows)]
    text = "\n".join(lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ("rows.csv", "rows.csv.gz", "rows.tsv", "rows.jsonl", "rows.json", "rows.jsonl.gz"))
def test_rows_of_a_file_are_grouped_by_input(name, tmp_path):
    dataset = read_file(write(tmp_path / name, ROWS))
    pairs = column_pairs(dataset, *text_columns(dataset.column_names), prefix="say: ")
    assert pairs == [("say: a", "one"), ("say: b, c", "two"), ("say: a", "three")]
    assert group_by_input(pairs) == [Example("say: a", ("one", "three")), Example("say: b, c", ("two",))]


def test_columns():
    assert text_columns(["id", "highlights", "article"]) == ("article", "highlights")
    assert text_columns(["summary", "document"]) == ("document", "summary")
    assert text_columns(["article", "highlights", "x"], "x") == ("x", "highlights")
    with pytest.raises(ValueError, match="no column 'y'; there are \\['article', 'highlights'\\]"):
        text_columns(["article", "highlights"], target="y")
    with pytest.raises(ValueError, match="Name the columns .* \\['q', 'a'\\]"):
        text_columns(["q", "a"])
    with pytest.raises(ValueError, match="Name the columns"):
        text_columns(["q", "a"], source="q")


def test_halves_do_not_depend_on_the_order_and_share_nothing():
    examples = [Example(f"input {number}", ()) for number in range(101)]
    select, report = halves(examples)
    assert (len(select), len(report)) == (50, 51) and not set(select) & set(report)
    assert set(select) | set(report) == set(examples)
    assert halves(examples[::-1]) == (select, report)
    assert select != examples[:50], "not just the first ones"
    assert {one.source for one in select} != set(sorted(one.source for one in examples)[:50]), "nor the first by name"


def test_what_is_no_text_is_refused_by_row_and_column(tmp_path):
    dataset = read_file(write(tmp_path / "rows.jsonl", [{"mr": "a", "ref": "x"}, {"mr": "b", "ref": None}]))
    with pytest.raises(ValueError, match="Row 1 has no text in column 'ref': None"):
        column_pairs(dataset, "mr", "ref")


def test_what_is_no_file_of_pairs(tmp_path):
    with pytest.raises(ValueError, match="'rows.txt' must end in one of .*'.csv'"):
        read_file("rows.txt")
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        read_file("nowhere.csv")
