"""Journal of a long run that can be resumed: completed work, as JSON lines in a file.

An entry is a key and plain values, whatever the work is. The first line holds the settings of the run, so that entries
of a different run are refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """Entries by key, stored in a file of JSON lines if a path is given.

    Args:
        path: The file, created with the first entry. None: entries are kept in memory only.
        asked: Settings that all entries depend on, as plain values.

    Raises:
        ValueError: The file belongs to a run with other settings, or is not a journal.
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
        """Store `values`, in the file before this returns, and in memory as they would be read back from it."""
        line = _line({"key": key, "values": values})
        if self.path is not None:
            with open(self.path, "ab") as file:
                file.write(line if file.tell() else self._header + line)
        self.entries[key] = json.loads(line)["values"]

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # the rest is a line that was cut off when the run ended
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
            raise ValueError(
                f"{self.path} is not a journal of this kind of run: name another file, or remove it."
            ) from error
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
