"""The ledger of certificates: how often a promise has been tried on the same inputs.

Each test on a calibrate part has its own chance to fail. Whoever asks until something passes has more than one, which
a certificate by itself cannot tell. The ledger is a file of JSON lines beside a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
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
        inputs: Fingerprint of the calibrate part.
        salt: Of the partition.
        question: Hash of what was promised, of what and by which tests.
    """

    inputs: str
    salt: str
    question: str

    @classmethod
    def on(cls, calibrate: Iterable[Example], salt: str, question: dict[str, Any]) -> Attempt:
        """Of a question, as plain values, about the inputs of a calibrate part."""
        return cls(_hash(sorted(map(short_hash, calibrate))), salt, _hash(question))

    def earlier(self, attempts: Sequence[Attempt]) -> int:
        """How many others on the same inputs came first. The same question again is the same test."""
        alike = [one for one in attempts if (one.inputs, one.salt) == (self.inputs, self.salt)]
        return alike.index(self) if self in alike else len(alike)


class Ledger:
    """The attempts that some folders know of, each once.

    Args:
        folders: Of checkpoints, which need not be there yet.

    Raises:
        ValueError: A folder has a file of this name that is no ledger.
    """

    def __init__(self, *folders: str | Path):
        self.folders = [Path(folder) for folder in folders]
        self.attempts: list[Attempt] = []
        for folder in self.folders:
            if (folder / FILE).is_file():
                self._add(_read(folder / FILE))

    def add(self, attempt: Attempt) -> None:
        """Keep an attempt, in the folders that are there before this returns."""
        self._add([attempt])
        self.write()

    def write(self) -> None:
        """Bring the files of all folders that are there up to date."""
        text = "".join(json.dumps(asdict(one)) + "\n" for one in self.attempts)
        for folder in self.folders:
            if folder.is_dir() and text:
                write_text(folder / FILE, text)

    def _add(self, attempts: Iterable[Attempt]) -> None:
        self.attempts = list(dict.fromkeys([*self.attempts, *attempts]))


def _read(path: Path) -> list[Attempt]:
    table = read_json_lines(decode(path.read_bytes(), str(path)), str(path))
    names = {one.name for one in fields(Attempt)}
    for row, record in enumerate(table.records):
        if set(record) != names or not all(isinstance(value, str) for value in record.values()):
            raise ValueError(
                f"{table.where(row)}: a ledger of certificates has {sorted(names)}, each a text: move the file away."
            )
    return [Attempt(**record) for record in table.records]


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=repr).encode()).hexdigest()[:16]
