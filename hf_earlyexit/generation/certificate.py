"""The exit certificate on disk: what was shown, for which setting, and what a call may not change.

A certificate is a JSON file beside a checkpoint, named in its `generation_config`. `calibration/model_calibration.py`
produces certificates. Independent of how `generate` works.
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

from hf_earlyexit.common.data import Example, short_hash
from hf_earlyexit.common.json_text import read_json
from hf_earlyexit.common.library import usual_generation_values
from hf_earlyexit.common.output_files import CERTIFICATE_FILE, write_text
from hf_earlyexit.common.version import __version__
from hf_earlyexit.decoding.settings import CERTIFICATE, ExitSettings
from hf_earlyexit.exits.accuracy_thresholds import ExitAccuracy
from hf_earlyexit.exits.criteria import SCHEDULES
from hf_earlyexit.generation.implementations import PLAIN


FILE = CERTIFICATE_FILE
FORMAT = 1
LONGEST_SHOWN = 200  # characters of a value in a message
# Fields that older files lack; their defaults claim the least.
LEFT_OUT = {"implementations", "agreement", "partition", "attempts"}
# Fields of a certificate that are objects, and the keys that each must have.
SHAPE = {
    "setting": set(),
    "loss": {"name", "description", "lower", "upper"},
    "split": {"hashes"},
    "data": {"max_source_tokens"},
    "generation": {"batch_size"},
    "versions": set(),
}
PACKAGES = ("transformers", "torch")
# Attributes of a generation config that do not change texts: what is returned, the layout of the cache, padding. Exit
# settings are compared separately, and assistants are refused with early exit.
NEUTRAL = {
    *("use_cache", "return_dict_in_generate", "pad_token_id", "transformers_version", "target_lookbehind"),
    *("compile_config", "disable_compile"),
}
SAMPLING = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
NEUTRAL_PREFIXES = ("_", "output_", "assistant_", "num_assistant_")


class CertificateWarning(UserWarning):
    """The model's certificate does not cover a call, so its guarantee does not hold for that call."""


@dataclass(frozen=True)
class Certificate:
    """The guarantee, the evidence for it, and the conditions under which it holds.

    Attributes:
        certified: Whether the setting was shown to meet the target. If not, the setting is full depth, which has no
            loss.
        reason: Why the setting is full depth; empty if it is not.
        name: Name of the setting in tables.
        setting: Exit keywords of `generate`.
        loss: `name`, `description`, `against` ("references" or "full depth"), `lower` and `upper`.
        target: Upper limit of the risk, the mean loss over future inputs.
        delta: The probability, over the draw of the calibration inputs, that the guarantee fails; None for `"crc"`,
            whose risk is also a mean over that draw.
        method: `"ltt"`, `"ucb"` or `"crc"`.
        bound: The bound that the method uses; None for `"crc"`.
        n: Number of calibration units behind the guarantee.
        unit: What one loss is measured on: "input", "group of inputs", "batch of 8 inputs".
        risk: The setting on the calibration units: `mean`, `upper_bound`, `p_value`, `cost`; None if nothing is
            certified.
        cost: The cost by which the cheapest setting was chosen, measured on the select part: `name` and `unit`.
        search: `order` of the tests, `curves`, the number that shares `delta`, `starts` of each chain (1 if missing),
            and `candidates`, the number of settings evaluated on the select part.
        table: Every tested setting, in the order of the tests: `name`, `curve`, `threshold`, `mean`, `upper_bound`,
            `p_value`, `cost`, `accepted`.
        split: `counts` of inputs, and short `hashes` of each, by part (see `partition`).
        data: `name` and `fingerprint` of the inputs and references; `max_source_tokens`, where longer ones were cut.
        weights: Fingerprint of the weights.
        generation: What a call must not change: exits, decoding, batch rule, dtype.
        versions: Versions of this package and its dependencies.
        created: The day, as in 2026-01-31.
        report: The setting on inputs that nothing was chosen on: `n`, `mean`, `low`, `high`, `mean_layers`, `cost`.
        format: Version of the file format.
        implementations: Implementations of the decoder that the guarantee holds for (see `implementations`): the
            measured one, and those whose texts were compared with it.
        agreement: By compared implementation: `texts` compared on the calibrate part, the number `different`, and the
            `batch_size`. For settings that passed with the first implementation, losses in `table` are the largest
            over all implementations.
        partition: `salt` and `shares` of the parts; None for certificates made before salts were introduced.
        attempts: Number of earlier certificates that were tested on inputs of this calibrate part, as far as the
            journal or the ledger of the checkpoint's folder records; None if neither was kept.
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
        """The entries of `generation` that are attributes of a generation config."""
        return {name: value for name, value in self.generation.items() if hasattr(GenerationConfig(), name)}

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The accepted thresholds of the certified setting's curve, descending; empty if nothing is certified.

        They were shown to meet the target jointly, so the guarantee holds with any of them.
        """
        own = next((row["curve"] for row in self.table if self.certified and row["name"] == self.name), None)
        found = {row["threshold"] for row in self.table if row["accepted"] and row["curve"] == own}
        return tuple(sorted(found, reverse=True)) if own is not None else ()

    def unseen(self, examples: Iterable[Example]) -> list[Example]:
        """The examples that are in no part of the split other than the report part."""
        known = {one for part, hashes in self.split["hashes"].items() if part != "report" for one in hashes}
        return [example for example in examples if short_hash(example) not in known]

    def save(self, folder: str | Path) -> Path:
        """Write the certificate's file into a folder."""
        path = Path(folder) / FILE
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read a certificate's file.

        Raises:
            OSError: The file cannot be read.
            ValueError: The file is not a certificate, or has a newer format.
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
        """The guarantee and its limits as readable text."""
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
        """Caveats that the numbers do not show."""
        found = ""
        if self.partition is None:
            found += " The inputs were split without a salt, so what was looked at before may be among them."
        if self.attempts is None:
            found += " Whether earlier certificates were tested on these calibration inputs was not recorded."
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
        """Conditions of a call that differ from the certified ones, as "name=found (certified: value)".

        Includes package versions.

        Args:
            conditions: Conditions of the call, as `call_conditions` returns them.
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
        """An implementation or source length that the certificate does not cover, in the form of `differences`.

        Args:
            implementation: How the call runs the decoder.
            source_tokens: Tokens of the longest input; None if unknown.
        """
        problems, cut = [], self.data["max_source_tokens"]
        if implementation not in self.implementations:
            problems.append(f"implementation={implementation!r} (certified: {self.implementations!r})")
        if cut is not None and (source_tokens is None or source_tokens > cut):
            problems.append(f"source tokens={source_tokens!r} (certified: at most {cut})")
        return problems


def _shown(value: Any) -> str:
    """The `repr` of a value; a long one is cut and gets a hash, so that two long values stay distinguishable."""
    text = repr(value)
    if len(text) <= LONGEST_SHOWN:
        return text
    return f"{text[:LONGEST_SHOWN]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def confidence(delta: float) -> str:
    """1 - delta as a percentage, never rounded up: 99.9 %, 97.5 %, 90 %."""
    return f"{math.floor(round((1 - delta) * 1e6, 3)) / 1e4:g} %"


def plural(unit: str) -> str:
    """The plural of a unit such as "input", "group of inputs", "batch of 8 inputs"."""
    first, space, others = unit.partition(" ")
    return f"{first}{'es' if first == 'batch' else 's'}{space}{others}"


def call_conditions(
    settings: ExitSettings, points: Collection[int], config: GenerationConfig, model: PreTrainedModel, rows: int | None
) -> dict[str, Any]:
    """Everything in a call that determines its texts, as plain values.

    Args:
        settings: The exit settings of the call.
        points: The exit points of the call.
        config: The generation config as prepared by the library, with all defaults filled in.
        model: Provides the dtype and the device type.
        rows: Batch size. It is recorded only if rows wait for each other.
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
    """The plain values of a criterion that can be stored; any other object unchanged."""
    can_be_stored = isinstance(criterion, ExitAccuracy) and isinstance(criterion.criterion, str)
    return criterion.to_dict() if can_be_stored else criterion


def _spelled_out(schedule: Any) -> Any:
    """A named schedule with its options but without the threshold, which is recorded separately; objects unchanged."""
    name = next((name for name, kind in SCHEDULES.items() if type(schedule) is kind), None)
    if name is None:
        return schedule
    options = {key: value for key, value in asdict(schedule).items() if key != "threshold"}
    return {"name": name, **options} if options else name


def decoding_of(config: GenerationConfig) -> dict[str, Any]:
    """The values of a prepared generation config that change texts and differ from the usual ones."""
    usual = usual_generation_values(config)
    values = {
        name: value
        for name, value in config.to_dict().items()
        if changes_texts(name) and value not in (None, usual.get(name)) and (config.do_sample or name not in SAMPLING)
    }
    if values.get("cache_implementation") == "static":
        # Selects an implementation, which is recorded separately. A quantised cache changes texts, so it stays.
        del values["cache_implementation"]
    if values.get("max_new_tokens") is not None:
        values.pop("max_length", None)  # has no effect then
    return {"max_length": config.max_length, **values} if "max_new_tokens" not in values else values


def changes_texts(name: str) -> bool:
    """Whether an attribute of a generation config changes texts and is not an exit setting."""
    kept_apart = {*NEUTRAL, *ExitSettings.names(), CERTIFICATE}
    return name not in kept_apart and not name.startswith(NEUTRAL_PREFIXES)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values after a JSON round trip, comparable with stored ones; other objects become their `repr`."""
    return json.loads(json.dumps(dict(values), default=repr))


@functools.cache
def versions() -> dict[str, str]:
    """Versions of this package and of the packages that its texts depend on."""

    return {"hf_earlyexit": __version__, **{name: metadata.version(name) for name in PACKAGES}}


def _short(of_packages: Mapping[str, str]) -> dict[str, str]:
    """Major and minor versions: patch releases do not invalidate a certificate."""
    return {f"{name} version": ".".join(number.split("+")[0].split(".")[:2]) for name, number in of_packages.items()}
