"""Hashes of the inputs that a model, its exits or a criterion were fitted on, in a file beside the checkpoint.

Good results on an input used for fitting prove nothing, so tests of a guarantee refuse these inputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from hf_earlyexit.common.data import Example, hash_of_input, short_hash
from hf_earlyexit.common.json_text import read_json
from hf_earlyexit.common.library import file_if_there
from hf_earlyexit.common.output_files import write_text


FILE = "exit_seen_inputs.json"
IN_CONFIG = "exit_seen_inputs"  # config key with the file name; without it the Hub is not queried for the file
FORMAT = 1
TRAINING, CRITERIA = "training", "criteria"
FITTED_ON = "fitted_on"  # key in a criterion's plain values: hashes of the inputs it was fitted on


@dataclass(frozen=True)
class SeenInputs:
    """Hashes of inputs.

    Attributes:
        by: Hashes by what was fitted on them: `"training"` of the model or its exits, or `"criteria"`.
    """

    by: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(self.by.values())

    def plus(self, by: str, sources: Iterable[str]) -> SeenInputs:
        """Add inputs, and groups (`Example.unit`). The texts include the prefix that the model reads."""
        return SeenInputs({**self.by, by: self.by.get(by, frozenset()) | {hash_of_input(one) for one in sources}})

    def with_criteria(self, criteria: Iterable[Any]) -> SeenInputs:
        """Add the inputs that criteria, as plain values, record as `fitted_on`."""
        known = (one[FITTED_ON] for one in criteria if isinstance(one, Mapping) and FITTED_ON in one)
        return SeenInputs({**self.by, CRITERIA: self.by.get(CRITERIA, frozenset()).union(*known)})

    def with_those_of(self, checkpoint: str | Path | None) -> SeenInputs:
        """Add the inputs recorded with a checkpoint that training resumes from; None: there is none.

        Raises:
            ValueError: The checkpoint's file is not such a file.
        """
        if checkpoint is None or not (Path(checkpoint) / FILE).is_file():
            return self
        found = SeenInputs.load(Path(checkpoint) / FILE).by
        return SeenInputs({by: self.by.get(by, frozenset()) | found.get(by, frozenset()) for by in {*self.by, *found}})

    def refuse(self, examples: Iterable[Example], what: str) -> None:
        """Refuse to test on inputs that were used for fitting, or whose group was.

        Args:
            examples: Inputs of the test.
            what: Name of the inputs, for the message.

        Raises:
            ValueError: Some inputs were used for fitting; the message gives their number.
        """
        hashes = {(short_hash(one), hash_of_input(one.unit)) for one in examples}
        counts = {by: sum(not known.isdisjoint(one) for one in hashes) for by, known in self.by.items()}
        if found := {by: count for by, count in counts.items() if count}:
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
        """Record in a model's config, before it is saved, whether there is such a file."""
        config.__dict__.pop(IN_CONFIG, None)
        if self:
            setattr(config, IN_CONFIG, FILE)

    @classmethod
    def load(cls, path: str | Path) -> SeenInputs:
        """Read the file.

        Raises:
            OSError: It cannot be read.
            ValueError: It is not such a file, or has a newer format.
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
        """Load the inputs recorded with a model, if its config names the file or its folder has one.

        Args:
            path: Folder or Hub id of the model.
            config: Config of the model.
            hub: Keywords of `from_pretrained` about the Hub.

        Raises:
            ValueError: The named file is missing or is not such a file. Without it, a test might use seen inputs.
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
