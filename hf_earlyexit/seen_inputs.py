"""Which inputs a model, its exits or a criterion were fitted on, as hashes in a file beside the checkpoint.

What has been fitted on an input proves nothing by doing well on it, so tests of a promise refuse these inputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from hf_earlyexit.data import Example, hash_of_input, short_hash
from hf_earlyexit.json_text import read_json
from hf_earlyexit.library import file_if_there
from hf_earlyexit.output_files import write_text


FILE = "exit_seen_inputs.json"
IN_CONFIG = "exit_seen_inputs"  # in a model's config: the name of the file, so that the Hub is asked for no other
FORMAT = 1
TRAINING, CRITERIA = "training", "criteria"
FITTED_ON = "fitted_on"  # of a criterion's plain values: hashes of the inputs that it was fitted on


@dataclass(frozen=True)
class SeenInputs:
    """Hashes of inputs.

    Attributes:
        by: What was fitted on them: `"training"` of the model or its exits, or `"criteria"`.
    """

    by: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(self.by.values())

    def plus(self, by: str, sources: Iterable[str]) -> SeenInputs:
        """These and other inputs, with the prefix that the model reads."""
        return SeenInputs({**self.by, by: self.by.get(by, frozenset()) | {hash_of_input(one) for one in sources}})

    def with_criteria(self, criteria: Iterable[Any]) -> SeenInputs:
        """These and the inputs that criteria of plain values say they were fitted on."""
        known = (one[FITTED_ON] for one in criteria if isinstance(one, Mapping) and FITTED_ON in one)
        return SeenInputs({**self.by, CRITERIA: self.by.get(CRITERIA, frozenset()).union(*known)})

    def refuse(self, examples: Iterable[Example], what: str) -> None:
        """Refuse to test on inputs that something was fitted on.

        Args:
            examples: Inputs of the test.
            what: They are, for the message.

        Raises:
            ValueError: It says how many.
        """
        hashes = {short_hash(one) for one in examples}
        found = {by: len(hashes & known) for by, known in self.by.items() if hashes & known}
        if found:
            counts = ", ".join(f"{count} by {by}" for by, count in found.items())
            raise ValueError(
                f"The checkpoint has seen inputs of {what} before ({counts}, of {len(hashes)}), so they cannot show "
                "what holds for new ones: give inputs that neither training nor a fitted criterion has read, or train "
                "and fit without these parts, under the same salt and shares."
            )

    def save(self, folder: str | Path) -> None:
        """Write the file into a folder."""
        values = {"format": FORMAT, "by": {by: sorted(known) for by, known in self.by.items()}}
        write_text(Path(folder) / FILE, json.dumps(values) + "\n")

    def name_in(self, config: PreTrainedConfig) -> None:
        """Say in a model's config whether there is such a file, before it is saved."""
        config.__dict__.pop(IN_CONFIG, None)
        if self:
            setattr(config, IN_CONFIG, FILE)

    @classmethod
    def load(cls, path: str | Path) -> SeenInputs:
        """Read the file.

        Raises:
            OSError: It cannot be read.
            ValueError: It is no such file, or of a newer format.
        """
        values = read_json(path)
        if not isinstance(values, dict) or not {"format", "by"} <= set(values):
            raise ValueError(f"{path} does not list seen inputs: a JSON object with `format` and `by` is expected.")
        if values["format"] != FORMAT:
            raise ValueError(
                f"{path} has format {values['format']!r}, known is {FORMAT}: install a newer hf_earlyexit."
            )
        by = values["by"]
        if not isinstance(by, dict) or not all(map(_are_hashes, by.values())):
            raise ValueError(f"{path} does not list seen inputs: `by` must be an object of lists of hashes.")
        return cls({name: frozenset(known) for name, known in by.items()})

    @classmethod
    def of_model(cls, path: str | Path, config: PreTrainedConfig, **hub: Any) -> SeenInputs:
        """What was recorded with a model, if its config says that there is such a file, or its folder has one.

        Args:
            path: Where the model is: a folder or a Hub id.
            config: Of the model.
            hub: Keywords of `from_pretrained` about the Hub.

        Raises:
            ValueError: The file is not there, or is no such file: without it tests might be on what was seen.
        """
        name = getattr(config, IN_CONFIG, None)
        if name not in (None, FILE):
            raise ValueError(f"The config of {str(path)!r} has {IN_CONFIG!r} as {name!r}: it must be {FILE!r}.")
        if name is None and not (Path(path) / FILE).is_file():
            return cls()
        file = file_if_there(path, FILE, **hub)
        if file is None:
            raise ValueError(
                f"The config of {str(path)!r} says that {name} lists the inputs that were trained on, and the file is "
                f"not there: put it back, or remove {IN_CONFIG!r} from the config."
            )
        return cls.load(file)


def _are_hashes(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
