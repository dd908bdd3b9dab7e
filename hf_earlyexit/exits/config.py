"""Configuration of an early-exit checkpoint: exit points, kinds of exit heads, classifiers.

Holds no tensors. The settings of a `generate` call are in `decoding/settings.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from hf_earlyexit.common.values import is_integer, known_fields


HEAD_KINDS = ("shared", "norm", "linear", "mlp", "shortcut")
CLASSIFIER_KINDS = ("linear", "mlp")


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape of the exit classifiers.

    Args:
        kind: `"linear"`, hidden to 1, or `"mlp"`, hidden to `width`, ReLU, to 1.
        shared: True: one classifier for all exit points, as in CALM. False: one for each.
        width: Inner width of an `"mlp"`; the model's hidden size if None.
        trained: Whether the weights are trained. Set it after training; untrained classifiers are refused.
    """

    kind: str = "linear"
    shared: bool = True
    width: int | None = None
    trained: bool = False

    def __post_init__(self):
        if self.kind not in CLASSIFIER_KINDS:
            raise ValueError(f"Classifier `kind` must be one of {CLASSIFIER_KINDS}, got {self.kind!r}.")
        for name in ("shared", "trained"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Classifier `{name}` must be True or False, got {getattr(self, name)!r}.")
        if self.width is not None and (not is_integer(self.width) or self.width < 1):
            raise ValueError(f"Classifier `width` must be a positive integer or None, got {self.width!r}.")


@dataclass(frozen=True)
class EarlyExitConfig:
    """The exit points of a checkpoint.

    Args:
        exit_layers: Layers with an exit point, as counts of layers run: 1 is after the first decoder layer. The last
            layer is not an exit point, since every token that reaches it ends there. None: every layer but the last.
        heads: The kind of head at the exit points, one for all or one per exit point. Every head starts as the logit
            lens (the model's own final norm and LM head, applied to the intermediate hidden state) and ends in the LM
            head. `"shared"` is the logit lens itself and has no weights. `"norm"` has its own final norm. `"linear"`
            adds to that norm's output a linear map of it, and `"mlp"` a two-layer perceptron of it; both start at
            zero. `"shortcut"` applies its own final norm to a linear map of the state; the map starts as the identity
            and is fitted without training by `hf_earlyexit.training.shortcuts.fit_shortcuts`.
        classifier: Shape of the exit classifiers (`ClassifierConfig`, or its fields as a dict), None for none.

    Raises:
        ValueError: A value is not legal; the message names it and the legal values.
    """

    exit_layers: Sequence[int] | None = None
    heads: str | Sequence[str] = "shared"
    classifier: ClassifierConfig | None = None

    def __post_init__(self):
        if not isinstance(self.classifier, ClassifierConfig | dict | None):
            raise ValueError(f"`classifier` must be a `ClassifierConfig`, a dict or None, got {self.classifier!r}.")
        if isinstance(self.classifier, dict):
            object.__setattr__(self, "classifier", ClassifierConfig(**known_fields(ClassifierConfig, self.classifier)))
        if not isinstance(self.heads, Sequence):
            raise ValueError(f"`heads` must be a kind or a list of kinds, got {self.heads!r}.")
        if self.exit_layers is not None:
            check_exit_layers(self.exit_layers)
            object.__setattr__(self, "exit_layers", tuple(self.exit_layers))
        if not isinstance(self.heads, str):
            object.__setattr__(self, "heads", tuple(self.heads))
        for kind in (self.heads,) if isinstance(self.heads, str) else self.heads:
            if kind not in HEAD_KINDS:
                raise ValueError(f"`heads` must be of the kinds {HEAD_KINDS}, got {kind!r}.")

    def for_layers(self, num_layers: int) -> EarlyExitConfig:
        """This configuration without defaults, resolved for a decoder of `num_layers` and checked against it."""
        layers = tuple(range(1, num_layers)) if self.exit_layers is None else self.exit_layers
        if layers and layers[-1] >= num_layers:
            raise ValueError(
                f"`exit_layers` has {layers[-1]}, but the decoder has {num_layers} layers: an exit point is a layer "
                f"from 1 to {num_layers - 1}, since every token ends at the last layer anyway."
            )
        heads = (self.heads,) * len(layers) if isinstance(self.heads, str) else self.heads
        if len(heads) != len(layers):
            raise ValueError(f"`heads` names {len(heads)} kinds for {len(layers)} exit layers {list(layers)}.")
        return EarlyExitConfig(layers, heads, self.classifier)

    def to_dict(self) -> dict:
        """The configuration as JSON-compatible values."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: EarlyExitConfig | dict | None) -> EarlyExitConfig:
        """The configuration with these values; an `EarlyExitConfig` is returned unchanged."""
        if isinstance(values, cls):
            return values
        if not isinstance(values, dict | None):
            raise ValueError(f"`early_exit` must be an `EarlyExitConfig` or a dict of its fields, got {values!r}.")
        return cls(**known_fields(cls, values or {}))


def check_exit_layers(layers: Sequence[int]) -> None:
    """Refuse `layers` unless it is a list of ascending integers from 1 on."""
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise ValueError(f"`exit_layers` must be a list, got {layers!r}.")
    if not all(is_integer(layer) and layer >= 1 for layer in layers):
        raise ValueError(f"`exit_layers` must be integers from 1 (after the first layer) on, got {list(layers)}.")
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"`exit_layers` must ascend without repetition, got {list(layers)}.")
