"""The ledger of certificates: how often a promise has been tried on the same inputs.

Each test on a calibrate part has its own chance to fail. Whoever asks until something passes has more than one, which
a certificate by itself cannot tell. The ledger is a file of JSON lines beside a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hf_earlyexit.data import Example, short_hash
from hf_earlyexit.json_text import decode
from hf_earlyexit.output_files import write_text
from hf_earlyexit.tables import read_json_lines


FILE = "exit_certificates.jsonl"


@dataclass(frozen=True)
class Attempt:
    """A certificate that was made.

    Attributes:
        inputs: Hashes of those of the calibrate part.
        salt: Of the partition.
        question: Hash of what was promised, of what and by which tests.
    """

    inputs: tuple[str, ...]
    salt: str
    question: str

    @classmethod
    def on(cls, calibrate: Iterable[Example], salt: str, question: dict[str, Any]) -> Attempt:
        """Of a question, as plain values, about the inputs of a calibrate part."""
        return cls(tuple(sorted(map(short_hash, calibrate))), salt, _hash(question))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Attempt:
        """Of the plain values that `asdict` gives and JSON keeps.

        Raises:
            ValueError: They are others.
        """
        names = [one.name for one in fields(cls)]
        inputs, *others = (values.get(name) for name in names)
        are_texts = isinstance(inputs, list | tuple) and all(isinstance(one, str) for one in (*inputs, *others))
        if set(values) != set(names) or not are_texts:
            raise ValueError(f"a ledger of certificates has {names}, the first a list of texts, the others texts")
        return cls(tuple(inputs), *others)

    def earlier(self, attempts: Sequence[Attempt]) -> int:
        """How many others came first that were tested on any of these inputs. The same question again is the same
        test."""
        own = set(self.inputs)
        alike = [one for one in attempts if own & set(one.inputs)]
        return alike.index(self) if self in alike else len(alike)


class Ledger:
    """The attempts that some folders know of, each once.

    Args:
        folders: Of checkpoints, which need not be there yet. Those that may not be written to are read all the same.

    Raises:
        ValueError: A folder has a file of this name that is no ledger.
    """

    def __init__(self, *folders: str | Path):
        self.folders = [Path(folder) for folder in folders]
        self.attempts: list[Attempt] = []
        self.read()

    def read(self) -> None:
        """Take over what the files say by now: others may have written since, hours are between."""
        for folder in self.folders:
            if (folder / FILE).is_file():
                self._add(_read(folder / FILE))

    def add(self, attempt: Attempt) -> None:
        """Keep an attempt, in the folders that are there before this returns."""
        self.read()
        self._add([attempt])
        self.write()

    def write(self) -> None:
        """Bring the files of all folders that are there and may be written to up to date."""
        self.read()
        text = "".join(json.dumps(asdict(one)) + "\n" for one in self.attempts)
        for folder in self.folders:
            if folder.is_dir() and os.access(folder, os.W_OK) and text:
                write_text(folder / FILE, text)

    def _add(self, attempts: Iterable[Attempt]) -> None:
        self.attempts = list(dict.fromkeys([*self.attempts, *attempts]))


def _read(path: Path) -> list[Attempt]:
    table = read_json_lines(decode(path.read_bytes(), str(path)), str(path))
    found = []
    for row, record in enumerate(table.records):
        try:
            found.append(Attempt.from_dict(record))
        except ValueError as error:
            raise ValueError(f"{table.where(row)}: {error}: move the file away.") from error
    return found


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=repr).encode()).hexdigest()[:16]
