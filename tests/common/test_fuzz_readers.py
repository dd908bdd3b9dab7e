"""Every reader returns the rows of any file unchanged, or refuses it in one line.

`-m slow` tries two thousand files of each kind.
"""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import strategies as some

from hf_earlyexit.calibration.ledger import FILE, Ledger
from hf_earlyexit.cli.data import read_examples
from hf_earlyexit.cli.generate import read_records
from hf_earlyexit.cli.speed import read_time_model
from hf_earlyexit.common.failures import is_users, one_line
from hf_earlyexit.common.partition import Partition
from hf_earlyexit.common.seen_inputs import SeenInputs
from hf_earlyexit.common.tables import read_file
from hf_earlyexit.generation.certificate import Certificate
from hf_earlyexit.reports.report import read_results
from hf_earlyexit.speed.recorded_exits import read_exits
from tests.common.strange_files import CONTENTS, FEW, LINES, MANY, NAMES, PROPER, SUFFIXES, TABLES, try_many


class Arguments:
    """The arguments of verbs that readers use, besides the file."""

    model = source_column = target_column = group_by = max_inputs = None
    prefix, batch, criterion = "", 1, None

    def __init__(self, path: str, **told):
        self.file = self.time_model = path
        vars(self).update(told)


def refused(read, *given) -> bool:
    """Whether the reader refuses the file in one line; any other error is a bug and is raised."""
    try:
        read(*given)
    except Exception as error:
        if not is_users(error):
            raise
        assert one_line(error) and "\n" not in one_line(error)
        return True
    return False


def try_all_readers(folder, content: bytes, suffix: str) -> None:
    path = str(folder / f"file{suffix}")
    with open(path, "wb") as file:
        file.write(content)
    for field in (None, "text", "input"):
        refused(read_records, path, field)
    refused(read_file, path)
    for told in ({}, {"group_by": "id"}, {"source_column": "text", "target_column": "text"}):
        for unique in (True, False):
            arguments = Arguments(path, **told)
            refused(lambda arguments=arguments, unique=unique: read_examples(arguments, Partition(), unique=unique))
    for read in (read_exits, read_results, Certificate.load, SeenInputs.load):
        refused(read, path)
    refused(read_time_model, Arguments(path), None)
    (folder / FILE).write_bytes(content)
    refused(Ledger, folder)


def read_back(folder, rows: list[list[str]], quoting: int, ends: str, suffix: str) -> None:
    """A table written by the standard library is read back with the same cells."""
    path, delimiter = folder / f"rows{suffix}", "\t" if suffix == ".tsv" else ","
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter, quoting=quoting, lineterminator=ends).writerows([["mr", "ref"], *rows])
    path.write_bytes(stream.getvalue().encode())
    assert read_file(path).records == [{"mr": source, "ref": target} for source, target in rows]


def json_back(folder, records: list[dict[str, str]], ensure_ascii: bool) -> None:
    """JSON lines and a JSON list are read back with the same objects."""
    lines = [json.dumps(record, ensure_ascii=ensure_ascii) for record in records]
    for suffix, text in ((".jsonl", "\n".join(lines)), (".json", f"[{','.join(lines)}]")):
        path = folder / f"rows{suffix}"
        path.write_bytes(text.encode())
        assert read_file(path).records == records


def lines_back(folder, lines: list[str], ends: str) -> None:
    """A text file is read back with the same lines."""
    path = folder / "lines.txt"
    path.write_bytes(ends.join(lines).encode())
    assert read_records(str(path), None) == [{"input": line} for line in lines]


TRIALS = {
    "any file": (try_all_readers, {"content": CONTENTS, "suffix": SUFFIXES}),
    "delimited": (
        read_back,
        TABLES,
    ),
    "JSON": (
        json_back,
        {
            "records": some.lists(some.dictionaries(NAMES, PROPER, min_size=1), min_size=1, max_size=4),
            "ensure_ascii": some.booleans(),
        },
    ),
    "text": (lines_back, {"lines": some.lists(LINES, min_size=1), "ends": some.sampled_from(("\n", "\r\n", "\n\n"))}),
}


@pytest.mark.parametrize("name", TRIALS)
def test_files_are_read_as_they_are_or_refused_in_one_line(name, tmp_path):
    try_many(*TRIALS[name], tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIALS)
def test_very_many_files_are_read_as_they_are_or_refused_in_one_line(name, tmp_path):
    try_many(*TRIALS[name], tmp_path, MANY)
