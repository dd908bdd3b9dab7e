"""Answers for a promise about quality on disk: what was shown, of which setting, and what a call may not change.

A certificate is a JSON file beside a checkpoint, named in its `generation_config`. It knows nothing of how a promise
is come by, which is `model_calibration.py`, nor of how `generate` works.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from hf_earlyexit.accuracy_thresholds import ExitAccuracy
from hf_earlyexit.data import Example, short_hash
from hf_earlyexit.implementations import PLAIN
from hf_earlyexit.json_text import read_json
from hf_earlyexit.library import usual_generation_values
from hf_earlyexit.output_files import write_text
from hf_earlyexit.policies import SCHEDULES
from hf_earlyexit.settings import CERTIFICATE, ExitSettings


FILE = "exit_certificate.json"
FORMAT = 1
LONGEST_SHOWN = 200  # characters of a value in a message
# What files of before these fields were known say by leaving them out: the least.
LEFT_OUT = {"implementations", "agreement", "partition", "attempts"}
# Objects of a certificate, and what in them a model is held against.
SHAPE = {
    "setting": set(),
    "loss": {"name", "description", "lower", "upper"},
    "split": {"hashes"},
    "data": {"max_source_tokens"},
    "generation": {"batch_size"},
    "versions": set(),
}
PACKAGES = ("transformers", "torch")
# What in a generation config leaves the texts alone: what is returned, how the cache lies in memory, padding. Exit
# settings are compared by themselves, and assistants are refused with early exit.
NEUTRAL = {
    *("use_cache", "return_dict_in_generate", "pad_token_id", "transformers_version", "target_lookbehind"),
    *("compile_config", "disable_compile"),
}
SAMPLING = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
NEUTRAL_PREFIXES = ("_", "output_", "assistant_", "num_assistant_")


class CertificateWarning(UserWarning):
    """A call is outside of what its model's certificate is about, so that the promise does not hold for it."""


@dataclass(frozen=True)
class Certificate:
    """What is promised, and of what.

    Attributes:
        certified: Whether the setting was shown to keep the target. If not, it is full depth, which loses nothing.
        reason: Why it is full depth; empty if it is not.
        name: Of the setting, in tables.
        setting: Exit keywords of `generate`.
        loss: `name`, `description`, `against` ("references" or "full depth"), `lower` and `upper`.
        target: What the risk, the mean loss over inputs to come, is at most.
        delta: The probability, over the draw of the calibration inputs, that this fails; None for `"crc"`, whose risk
            is a mean over that draw, too.
        method: `"ltt"`, `"ucb"` or `"crc"`.
        bound: Of the method; None for `"crc"`.
        n: Units that the promise rests on.
        unit: "input", or what else a loss is one of: "group of inputs", "batch of 8 inputs".
        risk: Of the setting on these: `mean`, `upper_bound`, `p_value`, `cost`; None if nothing is certified.
        cost: What the cheapest setting was chosen by, measured on the select part: `name` and `unit`.
        search: `order` of the tests, `curves`, the number that shares `delta`, `starts` of each chain (1 where it is
            not said), and `candidates`, how many settings were looked at on the select part.
        table: Every setting that was tested, in the order of the tests: `name`, `curve`, `threshold`, `mean`,
            `upper_bound`, `p_value`, `cost`, `accepted`.
        split: `counts` of inputs, and short `hashes` of each, by part (see `partition`).
        data: `name` and `fingerprint` of the inputs and references; `max_source_tokens`, where longer ones were cut.
        weights: Their fingerprint.
        generation: What a call must not change: exits, decoding, batch rule, dtype.
        versions: Of this package and what it stands on.
        created: The day, as in 2026-01-31.
        report: The setting on inputs that nothing was chosen on: `n`, `mean`, `low`, `high`, `mean_layers`, `cost`.
        format: Of the file.
        implementations: Ways to run the decoder that the promise holds for (see `implementations`): the one that was
            measured, and those that were agreed with.
        agreement: By way that was agreed with: `texts` compared on the calibrate part, those `different`, and the
            `batch_size`. Losses in `table` are the largest over all ways, of the settings that passed with the first.
        partition: `salt` and `shares` of the parts; None for certificates of before there was a salt.
        attempts: How many earlier certificates were tested on inputs of this calibrate part, as far as the journal or
            the ledger of the checkpoint's folder knows; None if neither was kept.
    """

    certified: bool
    reason: str
    name: str
    setting: dict[str, Any]
    loss: dict[str, Any]
    target: float
    delta: float | None
    method: str
    bound: str | None
    n: int
    unit: str
    risk: dict[str, Any] | None
    cost: dict[str, str]
    search: dict[str, Any]
    table: list[dict[str, Any]]
    split: dict[str, Any]
    data: dict[str, Any]
    weights: str
    generation: dict[str, Any]
    versions: dict[str, str]
    created: str
    report: dict[str, Any] | None = None
    format: int = FORMAT
    implementations: list[str] = field(default_factory=lambda: [PLAIN])
    agreement: dict[str, dict[str, int]] = field(default_factory=dict)
    partition: dict[str, Any] | None = None
    attempts: int | None = None

    @property
    def decoding(self) -> dict[str, Any]:
        """What `generation` says besides exits, in the words of a generation config."""
        return {name: value for name, value in self.generation.items() if hasattr(GenerationConfig(), name)}

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Those of the certified setting's curve that were shown to keep the target together with it, descending: the
        promise holds with any of them in place of its own. Empty if nothing is certified."""
        own = next((row["curve"] for row in self.table if self.certified and row["name"] == self.name), None)
        found = {row["threshold"] for row in self.table if row["accepted"] and row["curve"] == own}
        return tuple(sorted(found, reverse=True)) if own is not None else ()

    def unseen(self, examples: Iterable[Example]) -> list[Example]:
        """Those that the setting was neither chosen nor tested on, and that were not kept for looking around."""
        known = {one for part, hashes in self.split["hashes"].items() if part != "report" for one in hashes}
        return [example for example in examples if short_hash(example) not in known]

    def save(self, folder: str | Path) -> Path:
        """Write the file of the certificate into a folder."""
        path = Path(folder) / FILE
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read a certificate's file.

        Raises:
            OSError: It cannot be read.
            ValueError: It is no certificate, or one of a newer format.
        """
        try:
            values = read_json(path)
            found = values["format"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path} is no certificate: a JSON object with a `format` is expected.") from error
        if found != FORMAT:
            raise ValueError(f"{path} has format {found!r}, known is {FORMAT}: install a newer hf_earlyexit.")
        names = {one.name for one in fields(cls)}
        if different := (set(values) ^ names) - LEFT_OUT:
            raise ValueError(f"{path} is no certificate: it differs in {sorted(different)}.")
        for name, keys in SHAPE.items():
            if not isinstance(values[name], dict) or not keys <= set(values[name]):
                raise ValueError(f"{path} is no certificate: `{name}` must be an object with {sorted(keys)}.")
        return cls(**values)

    def in_words(self) -> str:
        """What is promised and what is not, for people."""
        if not self.certified:
            return f"Nothing is promised of early exit: {self.reason}. The setting is full depth, which loses nothing."
        of = "" if self.unit == "input" else f"over {plural(self.unit)} of the "
        loss = (
            f"the mean {of}{self.loss['description']} on inputs like these is at most {self.target:g} with {self.name}"
        )
        drawn = f"over the draw of {self.n} calibration {plural(self.unit)}"
        sure = (
            f"With {confidence(self.delta)} confidence {drawn}"
            if self.delta
            else f"In expectation {drawn} and one to come"
        )
        cost = f"it costs {self.risk['cost']:.2f} {self.cost['unit']}, measured on the select part"
        found = f"{sure}, {loss}. On these it was {self.risk['mean']:.4g}; {cost}.{self._reported()}"
        return found + self._of_the_inputs()

    def _of_the_inputs(self) -> str:
        """What weakens the promise that the numbers do not tell."""
        found = ""
        if self.partition is None:
            found += " The inputs were split without a salt, so what was looked at before may be among them."
        if self.attempts:
            times = "an earlier certificate was" if self.attempts == 1 else f"{self.attempts} earlier ones were"
            found += (
                f" On these calibration inputs, or some of them, {times} tested, which the confidence does not count."
            )
        return found

    def _reported(self) -> str:
        if self.report is None:
            return ""
        one = self.report
        interval = f"(95 % interval {one['low']:.4g} to {one['high']:.4g})"
        cost = f"with {one['mean_layers']:.2f} layers per token, at {one['cost']:.2f} {self.cost['unit']}"
        return f" On {one['n']} others that nothing was chosen on it was {one['mean']:.4g} {interval}, {cost}."

    def differences(self, conditions: Mapping[str, Any]) -> list[str]:
        """What of a call is not as certified, each as "name: found, certified: value"; versions of packages too.

        Args:
            conditions: Of the call, as `call_conditions` gives them.
        """
        found, expected = plain({**conditions, **_short(versions())}), {**self.generation, **_short(self.versions)}
        if found.get("exit_threshold") in self.thresholds:
            expected["exit_threshold"] = found["exit_threshold"]
        return [
            f"{name}={_shown(found.get(name))} (certified: {_shown(expected.get(name))})"
            for name in sorted({*found, *expected})
            if found.get(name) != expected.get(name)
        ]

    def uncovered(self, implementation: str, source_tokens: int | None) -> list[str]:
        """What of the way a call is run, and of its inputs, the promise was not shown for; as `differences`.

        Args:
            implementation: How the call runs the decoder.
            source_tokens: Of its longest input; None if that is not known.
        """
        problems, cut = [], self.data["max_source_tokens"]
        if implementation not in self.implementations:
            problems.append(f"implementation={implementation!r} (certified: {self.implementations!r})")
        if cut is not None and (source_tokens is None or source_tokens > cut):
            problems.append(f"source tokens={source_tokens!r} (certified: at most {cut})")
        return problems


def _shown(value: Any) -> str:
    """What is too long to read with a hash, so that two of them differ."""
    text = repr(value)
    if len(text) <= LONGEST_SHOWN:
        return text
    return f"{text[:LONGEST_SHOWN]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def confidence(delta: float) -> str:
    """1 - delta in per cent, never rounded up: 99.9 %, 97.5 %, 90 %."""
    return f"{math.floor(round((1 - delta) * 1e6, 3)) / 1e4:g} %"


def plural(unit: str) -> str:
    """Of "input", "group of inputs", "batch of 8 inputs"."""
    first, space, others = unit.partition(" ")
    return f"{first}{'es' if first == 'batch' else 's'}{space}{others}"


def call_conditions(
    settings: ExitSettings, points: Collection[int], config: GenerationConfig, model: PreTrainedModel, rows: int | None
) -> dict[str, Any]:
    """What of a call decides what it writes, as plain values.

    Args:
        settings: The exit settings of the call.
        points: The layers at which it asks.
        config: The generation config as the library has prepared it for the call, with all defaults filled in.
        model: Whose dtype and kind of device count.
        rows: Inputs at once. They matter only where rows wait for each other.
    """
    rows_wait = settings.batch_exit != "row"
    exits = {
        "exit_criterion": _as_values(settings.exit_criterion),
        "exit_threshold": None if settings.exit_criterion == "fixed" else settings.exit_threshold,
        "exit_schedule": _spelled_out(settings.schedule),
        "exit_points": sorted(points),
        "exit_candidates": settings.exit_candidates,
        "batch_exit": settings.batch_exit,
        "batch_size": rows if rows_wait else None,
    }
    place = {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    return plain({**exits, **decoding_of(config), **place})


def _as_values(criterion: Any) -> Any:
    """An object that can be stored as the plain values it would be stored with; anything else as it is."""
    can_be_stored = isinstance(criterion, ExitAccuracy) and isinstance(criterion.criterion, str)
    return criterion.to_dict() if can_be_stored else criterion


def _spelled_out(schedule: Any) -> Any:
    """A named schedule with all that it is made with but the threshold, which stands by itself; an object as it is."""
    name = next((name for name, kind in SCHEDULES.items() if type(schedule) is kind), None)
    if name is None:
        return schedule
    options = {key: value for key, value in asdict(schedule).items() if key != "threshold"}
    return {"name": name, **options} if options else name


def decoding_of(config: GenerationConfig) -> dict[str, Any]:
    """What a prepared generation config sets that changes texts and is not as everywhere."""
    usual = usual_generation_values(config)
    values = {
        name: value
        for name, value in config.to_dict().items()
        if changes_texts(name) and value not in (None, usual.get(name)) and (config.do_sample or name not in SAMPLING)
    }
    if values.get("cache_implementation") == "static":
        del values["cache_implementation"]  # a way to run the decoder, which is held apart; a quantised cache is more
    if values.get("max_new_tokens") is not None:
        values.pop("max_length", None)  # which then does not count
    return {"max_length": config.max_length, **values} if "max_new_tokens" not in values else values


def changes_texts(name: str) -> bool:
    """Whether an attribute of a generation config is about decoding: no exit setting, and not what is returned."""
    kept_apart = {*NEUTRAL, *ExitSettings.names(), CERTIFICATE}
    return name not in kept_apart and not name.startswith(NEUTRAL_PREFIXES)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back, so that what is found can be compared with what was stored; objects as their `repr`."""
    return json.loads(json.dumps(dict(values), default=repr))


@functools.cache
def versions() -> dict[str, str]:
    """Of this package and what its texts depend on."""
    from hf_earlyexit import __version__

    return {"hf_earlyexit": __version__, **{name: metadata.version(name) for name in PACKAGES}}


def _short(of_packages: Mapping[str, str]) -> dict[str, str]:
    """Major and minor versions: what is mended between them is not held against a certificate."""
    return {f"{name} version": ".".join(number.split("+")[0].split(".")[:2]) for name, number in of_packages.items()}
