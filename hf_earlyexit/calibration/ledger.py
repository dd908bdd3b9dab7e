"""The ledger of certificates: counts how often a guarantee was tested on the same inputs.

Each test on a calibrate part has its own chance to fail. Repeating tests until one passes raises that chance, which a
single certificate cannot show. The ledger is a file of JSON lines beside a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hf_earlyexit.common.data import Example, short_hash
from hf_earlyexit.common.json_text import decode
from hf_earlyexit.common.output_files import write_text
from hf_earlyexit.common.tables import read_json_lines


FILE = "exit_certificates.jsonl"


@dataclass(frozen=True)
class Attempt:
    """A certificate that was made.

    Attributes:
        inputs: Hashes of the inputs of the calibrate part.
        salt: Of the partition.
        question: Hash of the risk target, the settings tested and the tests.
    """

    inputs: tuple[str, ...]
    salt: str
    question: str

    @classmethod
    def on(cls, calibrate: Iterable[Example], salt: str, question: dict[str, Any]) -> Attempt:
        """The attempt for a question, given as plain values, about the inputs of a calibrate part."""
        return cls(tuple(sorted(map(short_hash, calibrate))), salt, _hash(question))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Attempt:
        """From the plain values that `asdict` gives and JSON keeps.

        Raises:
            ValueError: The values have another form.
        """
        names = [one.name for one in fields(cls)]
        inputs, *others = (values.get(name) for name in names)
        are_texts = isinstance(inputs, list | tuple) and all(isinstance(one, str) for one in (*inputs, *others))
        if set(values) != set(names) or not are_texts:
            raise ValueError(f"a ledger of certificates has {names}, the first a list of texts, the others texts")
        return cls(tuple(inputs), *others)

    def earlier(self, attempts: Sequence[Attempt]) -> int:
        """Number of earlier attempts tested on any of these inputs. The same question again is the same test."""
        own = set(self.inputs)
        alike = [one for one in attempts if own & set(one.inputs)]
        return alike.index(self) if self in alike else len(alike)


class Ledger:
    """The attempts recorded in some folders, each once.

    Args:
        folders: Of checkpoints; they need not exist yet. Folders without write permission are read too.

    Raises:
        ValueError: A folder has a file of this name that is not a ledger.
    """

    def __init__(self, *folders: str | Path):
        self.folders = [Path(folder) for folder in folders]
        self.attempts: list[Attempt] = []
        self.read()

    def read(self) -> None:
        """Add the attempts that the files now contain: other runs may have written since, hours can lie between."""
        for folder in self.folders:
            if (folder / FILE).is_file():
                self._add(_read(folder / FILE))

    def add(self, *attempts: Attempt) -> None:
        """Record attempts. The files of the folders that exist are written before this returns."""
        self.read()
        self._add(attempts)
        self.write()

    def write(self) -> None:
        """Update the files of all folders that exist and are writable."""
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
