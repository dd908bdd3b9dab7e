"""Answers for what exits are trained towards: each objective a frozen dataclass with one verb, `token_losses`.

An objective also names the parameters that it moves. It sees what the exit points say of a labelled batch
(`LabelledExits`), never the trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, nll_loss

from hf_earlyexit.config import EarlyExitConfig, is_number
from hf_earlyexit.labelled import LabelledExits
from hf_earlyexit.policies import at_least_float32


CLASSIFIER_PREFIX = "exit_heads.classifiers."


class Objective(Protocol):
    """What `EarlyExitTrainer` trains towards."""

    trains_classifiers: bool

    def check(self, config: EarlyExitConfig) -> None:
        """Raise a `ValueError` if a model with these exits cannot be trained so."""

    def moves(self, parameter: str) -> bool:
        """Whether the parameter of this name is trained; all others are frozen."""

    def prepared(self, agreement: dict[int, float]) -> Objective:
        """This objective for a model whose exits agree with its last layer on these shares of the tokens."""

    def token_losses(self, exits: LabelledExits) -> torch.Tensor:
        """`[N]`, the loss of each labelled token; the trainer takes the mean over all tokens of a step."""


def linear_weights(layers: Sequence[int]) -> list[float]:
    """Proportional to the layer: `layer / sum of layers`."""
    return [layer / sum(layers) for layer in layers]


def uniform_weights(layers: Sequence[int]) -> list[float]:
    """The same for all: `1 / number of layers`."""
    return [1 / len(layers)] * len(layers)


WEIGHTS = {"linear": linear_weights, "uniform": uniform_weights}


@dataclass(frozen=True)
class MultiExit:
    """Weighted cross-entropy of every exit point and of the last layer, as CALM is trained (arXiv 2207.07061).

    The whole model moves except exit classifiers, whose labels would move under them.

    Args:
        weights: `"linear"`, in proportion to the layer (CALM's), or `"uniform"`. They sum to 1. CALM has an exit after
            every layer; here the sum is over this model's exit points and its last layer.
        last_again: Add the last layer's loss once more, with weight 1 (DEED, arXiv 2311.08623), so that full depth
            does not pay for the exits.
        distillation: How much of an exit's loss is its cross-entropy to the last layer's probabilities, of the same
            pass and detached, in place of the label; from 0 to 1. Exits then learn what this model would say, not what
            some text said.
    """

    weights: str = "linear"
    last_again: bool = False
    distillation: float = 0.0

    trains_classifiers = False

    def __post_init__(self):
        if self.weights not in WEIGHTS:
            raise ValueError(f"`weights` must be one of {list(WEIGHTS)}, got {self.weights!r}.")
        if not isinstance(self.last_again, bool):
            raise ValueError(f"`last_again` must be True or False, got {self.last_again!r}.")
        if not (is_number(self.distillation) and 0 <= self.distillation <= 1):
            raise ValueError(f"`distillation` must be a number in [0, 1], got {self.distillation!r}.")

    def check(self, config: EarlyExitConfig) -> None:
        """Any model will do."""

    def moves(self, parameter: str) -> bool:
        return not parameter.startswith(CLASSIFIER_PREFIX)

    def prepared(self, agreement: dict[int, float]) -> MultiExit:
        return self

    def token_losses(self, exits: LabelledExits) -> torch.Tensor:
        *weights, last_weight = WEIGHTS[self.weights]((*exits.layers, exits.num_layers))
        last_logits = exits.logits(exits.num_layers)
        teacher = at_least_float32(last_logits.detach()).softmax(dim=-1) if self.distillation else None
        total = (last_weight + self.last_again) * label_loss(last_logits, exits.labels)
        for weight, layer in zip(weights, exits.layers):
            total = total + weight * self._exit_losses(exits.logits(layer), exits.labels, teacher)
        return total

    def _exit_losses(self, logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None) -> torch.Tensor:
        if teacher is None:
            return label_loss(logits, labels)
        log_probabilities = at_least_float32(logits).log_softmax(dim=-1)
        of_label = nll_loss(log_probabilities, labels, reduction="none")
        of_teacher = -(teacher * log_probabilities).sum(dim=-1)
        return torch.lerp(of_label, of_teacher, self.distillation)


@dataclass(frozen=True)
class ExitClassifiers:
    """Exit classifiers on a frozen model (CALM, arXiv 2207.07061, its "independent" objective).

    A classifier learns whether its exit point would write the same token as the last layer. Binary cross-entropy,
    plain mean over the exit points.

    Args:
        balanced: Weigh the two labels so that both count alike at every exit point: those that agree by 1 - a, the
            others by a, where a is the share that agrees. CALM's released code takes a of each batch; here it is
            measured once, before training, so that the loss does not depend on how tokens are dealt into batches.
        agreement: a of each exit point, in order; the trainer measures it if it is None.
    """

    balanced: bool = True
    agreement: tuple[float, ...] | None = field(default=None, repr=False)

    trains_classifiers = True

    def check(self, config: EarlyExitConfig) -> None:
        if config.classifier is None:
            raise ValueError(
                "This model has no exit classifiers to train: load it with "
                "`early_exit=EarlyExitConfig(classifier=ClassifierConfig())`."
            )
        if self.agreement is not None and len(self.agreement) != len(config.exit_layers):
            raise ValueError(
                f"`agreement` has {len(self.agreement)} shares for {len(config.exit_layers)} exit points: "
                f"{list(config.exit_layers)}."
            )

    def moves(self, parameter: str) -> bool:
        return parameter.startswith(CLASSIFIER_PREFIX)

    def prepared(self, agreement: dict[int, float]) -> ExitClassifiers:
        if self.agreement is not None:
            return self
        return ExitClassifiers(self.balanced, tuple(agreement[layer] for layer in sorted(agreement)))

    def token_losses(self, exits: LabelledExits) -> torch.Tensor:
        losses = [self._layer_losses(exits, place, layer) for place, layer in enumerate(exits.layers)]
        return torch.stack(losses).mean(dim=0)

    def _layer_losses(self, exits: LabelledExits, place: int, layer: int) -> torch.Tensor:
        agrees = (exits.logits(layer).argmax(dim=-1) == exits.full_depth_choices).float()
        losses = binary_cross_entropy_with_logits(exits.exit_logits(layer), agrees, reduction="none")
        if not self.balanced:
            return losses
        share = self.agreement[place]
        return losses * (agrees * (1 - share) + (1 - agrees) * share)


OBJECTIVES: dict[str, Any] = {"multi_exit": MultiExit, "classifiers": ExitClassifiers}


def label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`[N]`, cross-entropy of `logits [N, vocabulary]`, in fp32 at least."""
    return cross_entropy(at_least_float32(logits), labels, reduction="none")
