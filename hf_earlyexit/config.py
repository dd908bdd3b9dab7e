"""Answers for what is built into an early-exit checkpoint: exit points, the kinds of their heads, the classifiers.

Knows nothing of how a call of `generate` is set (that is `settings.py`) and holds no tensors.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from transformers import PreTrainedConfig, T5Config


HEAD_KINDS = ("shared", "norm", "linear", "mlp", "shortcut")
CLASSIFIER_KINDS = ("linear", "mlp")


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape of the exit classifiers.

    Args:
        kind: `"linear"`, hidden to 1, or `"mlp"`, hidden to `width`, ReLU, to 1.
        shared: One classifier for all exit points, as in CALM, or one each.
        width: Inner width of an `"mlp"`; the model's hidden size if None.
        trained: Whether the weights mean anything. Whoever trains them sets it; an untrained one is refused.
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
            layer is no exit point: every token that comes there leaves there. None: every layer but the last.
        heads: The kind of head at the exit points, one for all or one per exit point. All start as the logit lens,
            the model's own final norm and LM head on the middle state, and end in the LM head:
            `"shared"` is the logit lens itself and has no weights; `"norm"` has its own final norm; `"linear"` adds
            to that norm's output a linear map of it, `"mlp"` a two-layer perceptron of it, both starting at zero;
            `"shortcut"` has its own final norm of a linear map of the state, which starts as the identity and is
            fitted without training by `hf_earlyexit.shortcuts.fit_shortcuts`.
        classifier: Shape of the exit classifiers (`ClassifierConfig`, or its fields as a dict), None for none.

    Raises:
        ValueError: A value is not legal; the message names it and what is.
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
        """This configuration with everything spelled out for a decoder of `num_layers`, checked against it."""
        layers = tuple(range(1, num_layers)) if self.exit_layers is None else self.exit_layers
        if layers and layers[-1] >= num_layers:
            raise ValueError(
                f"`exit_layers` has {layers[-1]}, but the decoder has {num_layers} layers: an exit point is a layer "
                f"from 1 to {num_layers - 1}, since the last layer is left anyway."
            )
        heads = (self.heads,) * len(layers) if isinstance(self.heads, str) else self.heads
        if len(heads) != len(layers):
            raise ValueError(f"`heads` names {len(heads)} kinds for {len(layers)} exit layers {list(layers)}.")
        return EarlyExitConfig(layers, heads, self.classifier)

    def to_dict(self) -> dict:
        """As plain values that JSON can hold."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: EarlyExitConfig | dict | None) -> EarlyExitConfig:
        """The configuration that these values spell; one that is ready is given back."""
        if isinstance(values, cls):
            return values
        if not isinstance(values, dict | None):
            raise ValueError(f"`early_exit` must be an `EarlyExitConfig` or a dict of its fields, got {values!r}.")
        return cls(**known_fields(cls, values or {}))


def check_exit_layers(layers: Sequence[int]) -> None:
    """Refuse what is no list of layers after which a token may leave."""
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise ValueError(f"`exit_layers` must be a list, got {layers!r}.")
    if not all(is_integer(layer) and layer >= 1 for layer in layers):
        raise ValueError(f"`exit_layers` must be integers from 1 (after the first layer) on, got {list(layers)}.")
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"`exit_layers` must ascend without repetition, got {list(layers)}.")


def is_integer(value) -> bool:
    """Whether it is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    """Whether it is a number; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def known_fields(cls: type, values: dict) -> dict:
    """`values`, refused if one is no field of `cls`."""
    names = [one.name for one in fields(cls)]
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"{cls.__name__} has no {unknown}: it has {names}.")
    return values


class EarlyExitT5Config(T5Config):
    """A `T5Config` with `early_exit`, the plain values of an `EarlyExitConfig`."""

    model_type = "early_exit_t5"

    early_exit: dict | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if isinstance(self.early_exit, EarlyExitConfig):
            self.early_exit = self.early_exit.to_dict()

    def to_dict(self) -> dict:
        if isinstance(self.early_exit, EarlyExitConfig):  # set behind the constructor's back, as the Auto classes do
            self.early_exit = self.early_exit.to_dict()
        return super().to_dict()


def early_exit_config(
    path: str | os.PathLike, config: PreTrainedConfig | str | os.PathLike | None, kwargs: dict
) -> tuple[EarlyExitT5Config, dict]:
    """The early-exit configuration of a checkpoint, and the keyword arguments that are left for the model.

    A plain T5's is taken over value by value, so that nothing is lost: `scale_decoder_outputs` above all.
    """
    config_class = EarlyExitT5Config
    if not isinstance(config, PreTrainedConfig):
        path = path if config is None else config
        for_model = {
            name: kwargs.pop(name) for name in ("dtype", "torch_dtype", "attn_implementation") if name in kwargs
        }
        values, _ = config_class.get_config_dict(path, **kwargs)
        if not values:
            raise OSError(f"{str(path)!r} has no config.json.")
        model_type = values.get("model_type")
        family = {config_class.model_type: config_class, "t5": T5Config}.get(model_type)
        if family is None:
            raise ValueError(
                f"{str(path)!r} is a model of type {model_type!r}; early exit supports 't5' and "
                f"{config_class.model_type!r}. UMT5, which has a relative bias in every block, and mT5 are not "
                "supported yet."
            )
        config, kwargs = family.from_dict(values, return_unused_kwargs=True, **kwargs)
        kwargs |= for_model
    config = copy.deepcopy(config)
    if isinstance(config, config_class):
        return config, kwargs
    if config.model_type != "t5":
        raise ValueError(
            f"`config` must be a `T5Config` or a `{config_class.__name__}`, got `{type(config).__name__}`."
        )
    values = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        values.pop(name, None)
    return config_class(**values), kwargs
