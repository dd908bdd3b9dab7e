"""Reading text pairs and grouping them into distinct inputs."""

from __future__ import annotations

import gzip
import json

import pytest
from datasets import Dataset

from hf_earlyexit.common.data import (
    Example,
    column_pairs,
    data_fingerprint,
    group_by_input,
    read_examples,
    read_file,
    short_hash,
    text_columns,
    units_have_several,
)


ROWS = [{"mr": "a", "ref": "one"}, {"mr": "b, c", "ref": "two"}, {"mr": "a", "ref": "three"}]


def write(path, rows):
    """Write the rows in the format given by the file name."""
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


def rows(*cells: tuple, columns: str = "mr ref group") -> Dataset:
    return Dataset.from_list([dict(zip(columns.split(), row)) for row in cells])


def test_rows_of_a_group_with_the_same_input_are_one_input():
    """The unit is the group, however many inputs it has, or the input itself if rows are grouped by input."""
    dataset = rows(("a", "one", 1), ("b", "two", 2), ("a", "three", 1), ("c", "four", 2), ("a", "one", 1))
    examples = read_examples(dataset, "mr", "ref", prefix="say: ", group_by="group")
    assert examples == [
        Example("say: a", ("one", "three", "one"), "say: 1"),
        Example("say: b", ("two",), "say: 2"),
        Example("say: c", ("four",), "say: 2"),
    ]
    assert [one.unit for one in examples] == ["say: 1", "say: 2", "say: 2"]
    assert units_have_several(examples) and not units_have_several(examples[:2])
    by_input = read_examples(dataset, "mr", "ref", prefix="say: ", group_by="mr")
    assert by_input == [Example(f"say: {one.source[5:]}", one.references) for one in examples]


def test_inputs_without_references_and_without_groups():
    dataset = rows(("a", None, 1), ("b", "two", 1))
    assert read_examples(dataset, "mr") == [Example("a"), Example("b")]
    assert read_examples(dataset.select([1]), "mr", "ref", prefix="> ") == [Example("> b", ("two",))]
    assert read_examples(dataset.select([]), "mr") == []


def test_repeated_inputs_need_to_be_grouped():
    dataset = rows(
        ("a", "one", 1), ("b" * 100, "two", 2), ("b" * 100, "three", 3), ("b" * 100, "four", 2), ("a", "x", 1)
    )
    with pytest.raises(ValueError, match=r"3 of 5 rows repeat an input \('b{80}' stands in 3\).*`group_by=`"):
        read_examples(dataset, "mr", "ref")
    with pytest.raises(ValueError, match="The input 'b{80}' stands in two groups of `group_by='group'`, '2' and '3'"):
        read_examples(dataset, "mr", "ref", group_by="group")


@pytest.mark.parametrize("nothing", (None, ""))
def test_a_row_without_a_group_is_refused(nothing):
    """Otherwise, rows without a group would all form one group, or none."""
    dataset = rows(("a", "one", "x"), ("b", "two", nothing), ("c", "three", nothing))
    with pytest.raises(ValueError, match="Row 1 has no value in column 'group'"):
        read_examples(dataset, "mr", "ref", group_by="group")


@pytest.mark.parametrize("asked", (("x", "ref", "group"), ("mr", "x", "group"), ("mr", "ref", "x")))
def test_columns_that_are_not_there_are_named(asked):
    source, target, group_by = asked
    with pytest.raises(ValueError, match=r"There is no column 'x'; there are \['mr', 'ref', 'group'\]"):
        read_examples(rows(("a", "one", 1)), source, target, group_by=group_by)


def test_hashes_tell_inputs_apart():
    examples = [Example("abc", ("one",)), Example("abd"), Example("abc", (), "group")]
    first, second, third = map(short_hash, examples)
    assert first == third == "ba7816bf8f01cfea", "the beginning of SHA-256, of the input alone"
    assert second != first and len(second) == 16


def test_fingerprints_of_data():
    examples = [Example("a", ("one", "two")), Example("b", ("three",), "x"), Example("c", (), "x")]
    found = data_fingerprint(examples)
    assert len(found) == 64 and data_fingerprint(examples[::-1]) == found
    assert data_fingerprint([Example("a", ("two", "one")), *examples[1:]]) == found, "references in any order"
    changed = (
        examples[:2],
        [*examples, examples[2]],
        [Example("a ", ("one", "two")), *examples[1:]],
        [Example("a", ("one",)), *examples[1:]],
        [*examples[:2], Example("c", (), "y")],
        [Example("a", ("three", "two")), Example("b", ("one",), "x"), examples[2]],
    )
    assert len({found, *map(data_fingerprint, changed)}) == 7


def test_what_is_no_text_is_refused_by_row_and_column(tmp_path):
    dataset = read_file(write(tmp_path / "rows.jsonl", [{"mr": "a", "ref": "x"}, {"mr": "b", "ref": None}]))
    with pytest.raises(ValueError, match="rows.jsonl, line 2 has no text in column 'ref': None"):
        column_pairs(dataset, "mr", "ref")
    with pytest.raises(ValueError, match="Row 1 has no text in column 'ref': None"):
        column_pairs(Dataset.from_list(dataset.records), "mr", "ref")


def test_what_is_no_file_of_pairs(tmp_path):
    with pytest.raises(ValueError, match="'rows.txt' must end in one of .*'.csv'"):
        read_file("rows.txt")
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        read_file("nowhere.csv")
