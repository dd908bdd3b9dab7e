"""A journal returns its entries unchanged, wherever the run was cut off, and only to a run with the same settings."""

from __future__ import annotations

import json

import pytest

from hf_earlyexit.common.journal import Journal


ASKED = {"weights": "ab", "max_new_tokens": 8, "shares": {"select": 0.2, "report": 0.8}}
ENTRIES = {"first": {"texts": ["é\n", ""], "layers": [[1, 2], []]}, "second": [0.1, None], "third": "end"}


def filled(path, entries=ENTRIES) -> Journal:
    journal = Journal(path, ASKED)
    for key, values in entries.items():
        if key not in journal:
            journal.add(key, values)
    return journal


def test_entries_come_back(tmp_path):
    path = tmp_path / "run.jsonl"
    journal = Journal(path, ASKED)
    assert not path.exists(), "it is made with the first entry"
    for place, (key, values) in enumerate(ENTRIES.items(), start=1):
        assert key not in journal
        journal.add(key, values)
        assert key in journal and journal[key] == values
        assert Journal(path, ASKED).entries == dict(list(ENTRIES.items())[:place]), "each is in the file at once"
    assert json.loads(path.read_text().splitlines()[0]) == {"asked": ASKED}


def test_without_a_file_entries_live_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = filled(None)
    assert journal.entries == ENTRIES and "fourth" not in journal and list(tmp_path.iterdir()) == []
    assert Journal(None, ASKED).entries == {}


@pytest.mark.parametrize("name", (None, "run.jsonl"))
def test_an_entry_is_the_same_before_and_after_it_was_read(name, tmp_path):
    journal = Journal(name and tmp_path / name, ASKED)
    journal.add("pair", (1, {2: "two"}))
    assert journal["pair"] == [1, {"2": "two"}]
    with pytest.raises(TypeError):
        journal.add("object", object())
    assert "object" not in journal
    if name:
        assert Journal(tmp_path / name, ASKED).entries == journal.entries


def test_a_run_ended_anywhere_is_taken_up(tmp_path):
    """After a cut at any byte, whole lines are kept, and the resumed run writes the file of an uninterrupted run."""
    whole = tmp_path / "whole.jsonl"
    filled(whole)
    content, cut = whole.read_bytes(), tmp_path / "cut.jsonl"
    for end in range(len(content) + 1):
        cut.write_bytes(content[:end])
        kept = max(0, content[:end].count(b"\n") - 1)
        assert Journal(cut, ASKED).entries == dict(list(ENTRIES.items())[:kept])
        assert filled(cut).entries == ENTRIES
        assert cut.read_bytes() == content, f"cut behind byte {end}"


@pytest.mark.parametrize("end", (b"", b'{"key": "fou'))
def test_entries_of_another_run_are_refused_by_what_differs(end, tmp_path):
    path = tmp_path / "run.jsonl"
    filled(path)
    path.write_bytes(path.read_bytes() + end)
    before = path.read_bytes()
    asked = {"weights": "cd", "max_new_tokens": 8, "shares": {"select": 0.2, "report": 0.7}}
    with pytest.raises(ValueError, match=r"run.jsonl has entries of another run: shares, weights differ\. shares is"):
        Journal(path, asked)
    with pytest.raises(ValueError, match=r": a, b, c, d, max_new_tokens, shares, weights differ\."):
        Journal(path, dict.fromkeys("dcba", 1))
    with pytest.raises(ValueError, match=r"max_new_tokens differ\. max_new_tokens is 8 there and 9 here"):
        Journal(path, ASKED | {"max_new_tokens": 9})
    with pytest.raises(ValueError, match="num_beams is None there and 2 here"):
        Journal(path, ASKED | {"num_beams": 2})
    with pytest.raises(ValueError, match="weights is 'ab' there and None here"):
        Journal(path, {name: value for name, value in ASKED.items() if name != "weights"})
    assert path.read_bytes() == before, "and left as they are"


@pytest.mark.parametrize(
    "content",
    (
        b"a note",
        b"a note\n",
        b'{"asked": {"weights"',
        b"\xff\xfe\n",
        b"[1, 2]\n",
        b'{"asked": 3}\n',
        b'{"other": {}}\n',
        b'{"asked": {}}\n{"key": "without values"}\n',
        b"\n",
    ),
)
def test_what_is_no_journal_is_refused_and_left_as_it_is(content, tmp_path):
    path = tmp_path / "note.txt"
    path.write_bytes(content)
    asked = {} if b"{}" in content else {"a": 1}
    with pytest.raises(
        ValueError, match=r"note.txt is not a journal of this kind of run: name another file, or remove it"
    ):
        Journal(path, asked)
    assert path.read_bytes() == content
