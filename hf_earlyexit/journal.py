"""Answers for long runs that can be taken up again: what has been done so far, line by line in a file.

Knows nothing of what is done: an entry is a key and plain values. The first line says what the run was asked, so that
entries of another run are never taken for its own.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """Entries by key, kept in a file of JSON lines if there is one.

    Args:
        path: The file; it is made with the first entry. None: entries live as long as the journal.
        asked: What all entries depend on, as plain values.

    Raises:
        ValueError: The file belongs to a run that was asked something else, or is no journal.
    """

    def __init__(self, path: str | Path | None, asked: dict[str, Any]):
        self.path = None if path is None else Path(path)
        self.asked = json.loads(json.dumps(asked))
        self._header = _line({"asked": self.asked})
        self.entries: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            self._read()

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def add(self, key: str, values: Any) -> None:
        """Keep `values`, in the file before this returns, and as they come back from there."""
        line = _line({"key": key, "values": values})
        if self.path is not None:
            with open(self.path, "ab") as file:
                file.write(line if file.tell() else self._header + line)
        self.entries[key] = json.loads(line)["values"]

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # behind it is what was written when the run was ended
        if whole or not self._header.startswith(content):
            self._take_up(whole)
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))

    def _take_up(self, whole: bytes) -> None:
        try:
            header, *lines = [json.loads(line) for line in whole.splitlines()]
            found = dict(header["asked"])
            self.entries = {line["key"]: line["values"] for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no journal of such a run: name another file, or remove it.") from error
        self._refuse_other(found)

    def _refuse_other(self, found: dict[str, Any]) -> None:
        differing = sorted(name for name in {*found, *self.asked} if found.get(name) != self.asked.get(name))
        if differing:
            name = differing[0]
            raise ValueError(
                f"{self.path} has entries of another run: {', '.join(differing)} differ. {name} is "
                f"{found.get(name)!r} there and {self.asked.get(name)!r} here. Name another file, or remove it."
            )


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"
