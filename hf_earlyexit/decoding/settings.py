"""Exit settings of one `generate` call: reading, merging and checking them.

Settings come from `generation_config` and the keywords of `generate`. What is built into the checkpoint is in
`exits/config.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import GenerationConfig

from hf_earlyexit.common.values import is_integer, is_number
from hf_earlyexit.decoding.cache import FILLS
from hf_earlyexit.exits.accuracy_thresholds import ExitAccuracy
from hf_earlyexit.exits.config import EarlyExitConfig, check_exit_layers
from hf_earlyexit.exits.criteria import BATCH_RULES, CRITERIA, SCHEDULES, WITH_CANDIDATES, ExitCriterion


CERTIFICATE = "exit_certificate"  # field of a generation config: the name of the certificate file


@dataclass(frozen=True)
class ExitSettings:
    """The exit settings of one call; the fields are the keywords of `generate`.

    Attributes:
        early_exit: Whether tokens may exit early.
        exit_criterion: A name in `CRITERIA`, an object with `confidence(point)`, or the plain values of an
            `ExitAccuracy`, which can be stored in a file.
        exit_threshold: The minimum confidence at which a token exits, in [0, 1]. 1 does not disable exits: a token
            exits at a confidence of exactly 1, for example of a saturated softmax. At 0 every token exits at its first
            exit point.
        exit_schedule: A name in `SCHEDULES`, `{"name": ..., "tau": ...}`, or an object with
            `threshold_at(token, max_new_tokens)`, which then defines the threshold itself.
        exit_layer: The layer after which `"fixed"` exits.
        exit_layers: The model's exit points to evaluate; all if None.
        exit_candidates: With a criterion in `WITH_CANDIDATES`, how many tokens are scored after a token's first exit
            point; the whole vocabulary if None.
        batch_exit: A name in `BATCH_RULES`.
        fill: `"lazy"` or `"eager"` (see `EarlyExitCache`); None: eager where graphs are recorded, lazy elsewhere.
        strict_certificate: Whether a call that the model's certificate does not cover is refused.
        record_exits: Whether the results of all evaluated exits are recorded; exits are then evaluated even without
            early exit.
    """

    early_exit: bool = False
    exit_criterion: str | dict[str, Any] | ExitCriterion | None = None
    exit_threshold: float | None = None
    exit_schedule: Any = "constant"
    exit_layer: int | None = None
    exit_layers: Sequence[int] | None = None
    exit_candidates: int | None = None
    batch_exit: str = "row"
    fill: str | None = None
    strict_certificate: bool = False
    record_exits: bool = False

    @classmethod
    def names(cls) -> list[str]:
        return [one.name for one in fields(cls)]

    @classmethod
    def merge(
        cls, given: dict[str, Any], passed: GenerationConfig | None, stored: GenerationConfig | None
    ) -> ExitSettings:
        """Settings of a call: its keywords override the `generation_config` passed to it, which overrides the model's.

        As a keyword, `exit_threshold=None` disables early exit; in a `GenerationConfig`, None means not set.

        Raises:
            ValueError: A value is not legal or conflicts with another; the message names it and the remedy.
        """
        given, passed, stored = dict(given), _set_values(passed), _set_values(stored)
        if "exit_threshold" in given and given["exit_threshold"] is None:
            given["early_exit"] = False
        given = {name: value for name, value in given.items() if value is not None}
        explicit = {**passed, **given}
        if explicit.get("exit_criterion", stored.get("exit_criterion")) != stored.get("exit_criterion"):
            for name in ("exit_threshold", "exit_candidates"):  # specific to the stored criterion
                stored.pop(name, None)
        values = {**stored, **explicit}
        asked = next((on for on in map(_asks, (given, passed, stored)) if on is not None), False)
        settings = cls(**{**values, "early_exit": asked})
        settings._check_values()
        settings._check_company(explicit)
        return settings

    def _check_values(self) -> None:
        for name in ("early_exit", "strict_certificate", "record_exits"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        if isinstance(self.exit_criterion, dict):
            ExitAccuracy.from_dict(self.exit_criterion)
        else:
            _check_choice(
                "exit_criterion", self.exit_criterion, CRITERIA, "confidence", "one with `confidence(point)`"
            )
        self._check_schedule()
        _check_choice("batch_exit", self.batch_exit, BATCH_RULES)
        if self.fill is not None:
            _check_choice("fill", self.fill, FILLS)
        threshold = self.exit_threshold
        if threshold is not None and not (is_number(threshold) and 0 <= threshold <= 1):
            raise ValueError(
                f"`exit_threshold` must be a number in [0, 1], got {self.exit_threshold!r}. "
                "For full depth pass `early_exit=False`."
            )
        if self.exit_layer is not None and not (is_integer(self.exit_layer) and self.exit_layer >= 1):
            raise ValueError(f"`exit_layer` must be an integer from 1 on, got {self.exit_layer!r}.")
        if self.exit_layers is not None:
            check_exit_layers(self.exit_layers)
            if not self.exit_layers:
                raise ValueError(
                    "`exit_layers=[]` names no exit point, so no token could exit: pass `early_exit=False` for full "
                    "depth, or leave it out to use all exit points of the model."
                )
        if self.exit_candidates is not None and not (is_integer(self.exit_candidates) and self.exit_candidates >= 2):
            raise ValueError(
                f"`exit_candidates` must be an integer from 2 on, got {self.exit_candidates!r}. To score the whole "
                "vocabulary leave it out."
            )

    def _check_company(self, explicit: dict[str, Any]) -> None:
        """Check that the settings fit together.

        `explicit` holds the settings of the call itself. With `early_exit=False` in it, unused settings are allowed.
        """
        idle = sorted({"exit_layers", "exit_candidates", "exit_schedule", "batch_exit", "fill"} & set(explicit))
        if idle and self.exit_criterion is None and explicit.get("early_exit") is not False:
            raise ValueError(f"`{idle[0]}` does nothing without an `exit_criterion`: one of {list(CRITERIA)}.")
        if "exit_layer" in explicit and self.exit_criterion != "fixed":
            raise ValueError(
                f'`exit_layer={self.exit_layer}` goes with `exit_criterion="fixed"`, not {self.exit_criterion!r}.'
            )
        if self.exit_candidates is not None and ("exit_candidates" in explicit or self.early_exit):
            self._check_criterion_has_candidates()
        if "exit_layers" in explicit and self.exit_criterion == "fixed":
            raise ValueError(
                f'`exit_layers={list(self.exit_layers)}` does not go with `exit_criterion="fixed"`, which asks at its '
                "`exit_layer` alone: leave it out."
            )
        if self.record_exits and self.exit_criterion in (None, "fixed"):
            raise ValueError(
                f"`record_exits=True` needs an `exit_criterion` that has a confidence, got {self.exit_criterion!r}: "
                f"name one of {[name for name in CRITERIA if name != 'fixed']}."
            )
        if not self.early_exit:
            return
        if self.exit_criterion is None:
            raise ValueError(f"Early exit needs an `exit_criterion`: one of {list(CRITERIA)}, or your own object.")
        if self.exit_criterion == "fixed":
            if self.exit_layer is None:
                raise ValueError('`exit_criterion="fixed"` needs `exit_layer`, the layer to exit after.')
            if "exit_threshold" in explicit:
                raise ValueError(
                    f'`exit_threshold={self.exit_threshold}` does not go with `exit_criterion="fixed"`: leave it out.'
                )
        elif self._has_own_schedule:
            if "exit_threshold" in explicit:
                raise ValueError("`exit_threshold` does not go with an `exit_schedule` object, which has its own.")
        elif self.exit_threshold is None:
            raise ValueError(f"`exit_criterion={self.exit_criterion!r}` needs an `exit_threshold` in [0, 1].")

    def _check_criterion_has_candidates(self) -> None:
        if self.exit_criterion not in (None, *WITH_CANDIDATES):
            raise ValueError(
                f"`exit_candidates={self.exit_candidates}` goes with an `exit_criterion` that looks at the vocabulary "
                f"head, one of {list(WITH_CANDIDATES)}, not {self.exit_criterion!r}: leave it out."
            )

    def check_against(self, config: EarlyExitConfig, num_layers: int, vocabulary: int | None = None) -> None:
        """Check the settings against the model's exit configuration.

        Raises:
            ValueError: The model lacks an exit point or a trained classifier, or its vocabulary is smaller than
                `exit_candidates`.
        """
        if not self.asks:
            return
        if vocabulary is not None and (self.exit_candidates or 0) > vocabulary:
            raise ValueError(
                f"`exit_candidates={self.exit_candidates}` is more than the vocabulary of this model, {vocabulary}: "
                "leave it out to score all of it, or name fewer."
            )
        if self.exit_criterion == "fixed" and self.exit_layer not in (*config.exit_layers, num_layers):
            raise ValueError(
                f"`exit_layer={self.exit_layer}` is not an exit point of this model: exits are possible after "
                f"{[*config.exit_layers, num_layers]}. Load it with `early_exit=EarlyExitConfig(exit_layers=...)`."
            )
        foreign = sorted(set(self.exit_layers or ()) - set(config.exit_layers))
        if foreign and self.exit_criterion != "fixed":
            raise ValueError(
                f"`exit_layers={list(self.exit_layers)}` has {foreign}, which are no exit points of this model: it "
                f"has {list(config.exit_layers)}. Load it with `early_exit=EarlyExitConfig(exit_layers=...)` for more."
            )
        criterion = self.exit_criterion if isinstance(self.exit_criterion, str) else self.criterion
        if isinstance(criterion, ExitAccuracy):
            criterion.check_exit_points(sorted(self.exit_points(config, num_layers)))
            criterion = criterion.criterion
        if criterion == "classifier":
            if config.classifier is None:
                raise ValueError(
                    'This model has no exit classifiers, so `exit_criterion="classifier"` cannot work: load it with '
                    "`early_exit=EarlyExitConfig(classifier=ClassifierConfig())` and train them, or use another one."
                )
            if not config.classifier.trained:
                raise ValueError(
                    'The exit classifiers of this model are untrained, so `exit_criterion="classifier"` would leave '
                    "at random: train `model.exit_heads.classifiers`, then set "
                    '`model.config.early_exit["classifier"]["trained"] = True`; or use `exit_criterion="softmax"` '
                    'or "state", which need no training.'
                )

    def exit_points(self, config: EarlyExitConfig, num_layers: int) -> Collection[int]:
        """The layers after which this call evaluates exits."""
        if not self.asks:
            return frozenset()
        if self.exit_criterion == "fixed":
            return frozenset({self.exit_layer} - {num_layers})
        return frozenset(config.exit_layers if self.exit_layers is None else self.exit_layers)

    @property
    def asks(self) -> bool:
        """Whether exits are evaluated, for early exit or for recording."""
        return self.early_exit or self.record_exits

    @property
    def criterion(self) -> ExitCriterion:
        """The criterion as an object."""
        if isinstance(self.exit_criterion, dict):
            return ExitAccuracy.from_dict(self.exit_criterion)
        if not isinstance(self.exit_criterion, str):
            return self.exit_criterion
        arguments = {"fixed": {"exit_layer": self.exit_layer}}
        arguments |= {name: {"candidates": self.exit_candidates} for name in WITH_CANDIDATES}
        return CRITERIA[self.exit_criterion](**arguments.get(self.exit_criterion, {}))

    @property
    def schedule(self):
        """The threshold schedule as an object. `"fixed"` has confidence 0 or 1, so any threshold between works."""
        if self._has_own_schedule:
            return self.exit_schedule
        threshold = 0.5 if self.exit_criterion == "fixed" else self.exit_threshold
        return SCHEDULES[self._schedule_name](threshold, **self._schedule_options)

    @property
    def _has_own_schedule(self) -> bool:
        return not isinstance(self.exit_schedule, (str, dict))

    @property
    def _schedule_name(self) -> Any:
        return self.exit_schedule.get("name") if isinstance(self.exit_schedule, dict) else self.exit_schedule

    @property
    def _schedule_options(self) -> dict[str, Any]:
        values = self.exit_schedule if isinstance(self.exit_schedule, dict) else {}
        return {name: value for name, value in values.items() if name != "name"}

    def _check_schedule(self) -> None:
        _check_choice("exit_schedule", self._schedule_name, SCHEDULES, "threshold_at", "one with `threshold_at`")
        if self._has_own_schedule:
            return
        allowed = {one.name for one in fields(SCHEDULES[self._schedule_name])} - {"threshold"}
        if set(self._schedule_options) - allowed:
            raise ValueError(f"`exit_schedule={self.exit_schedule}` may have {['name', *sorted(allowed)]}.")
        for name, value in self._schedule_options.items():
            if not is_number(value) or not 0 <= value < math.inf:
                raise ValueError(f"`{name}` of `exit_schedule` must be a number from 0 on, got {value!r}.")


def _asks(values: dict[str, Any]) -> Any:
    """Whether these settings request early exit: `early_exit` if set, else True if they say how to exit, else None."""
    named = bool({"exit_criterion", "exit_threshold", "exit_layer"} & set(values))
    return values.get("early_exit", True if named else None)


def _set_values(config: GenerationConfig | None) -> dict[str, Any]:
    """The exit settings that a generation config has set."""
    values = {name: getattr(config, name, None) for name in ExitSettings.names()}
    return {name: value for name, value in values.items() if value is not None}


def _check_choice(
    name: str, value: Any, choices: Collection[str], verb: str | None = None, description: str = ""
) -> None:
    """Refuse a value that is neither in `choices` nor, if `verb` is given, an object with that method."""
    if value is None and name == "exit_criterion":
        return
    if isinstance(value, str) and value in choices:
        return
    if verb is not None and not isinstance(value, (str, type)) and callable(getattr(value, verb, None)):
        return
    objects = f", or an object of your own, {description}" if verb else ""
    raise ValueError(f"`{name}` must be one of {list(choices)}{objects}, got {value!r}.")
