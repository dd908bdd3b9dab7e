"""The base class of objectives, and losses that several of them share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.nn.functional import cross_entropy

from hf_earlyexit.exits.config import EarlyExitConfig
from hf_earlyexit.exits.criteria import at_least_float32
from hf_earlyexit.generation.teacher_forced import TeacherForcedExits


CLASSIFIER_PREFIX = "exit_heads.classifiers."
HEAD_PREFIX = "exit_heads.heads."


class Objective:
    """Base class of the objectives of `EarlyExitTrainer`: subclasses are frozen dataclasses with `token_losses`.

    By default the whole model is trained except exit classifiers, whose labels would change during training, there are
    no requirements on the model, and nothing changes from step to step.
    """

    trains_classifiers: ClassVar[bool] = False

    def check(self, config: EarlyExitConfig) -> None:
        """Raise a `ValueError` if a model with these exits cannot be trained with this objective."""

    def moves(self, parameter: str) -> bool:
        """Whether the parameter of this name is trained; all others are frozen."""
        return not parameter.startswith(CLASSIFIER_PREFIX)

    def prepared(self, agreement: dict[int, float]) -> Objective:
        """This objective for a model with these shares of tokens on which its exits agree with its last layer."""
        return self

    def at(self, step: int, steps: int) -> Objective:
        """This objective at optimiser step `step`, from 0, of `steps`; curricula depend on it."""
        return self

    def layer_dropout(self, num_layers: int) -> list[float]:
        """The rate at which each decoder layer is skipped for a row during training; empty for never."""
        return []

    def token_losses(self, exits: TeacherForcedExits) -> torch.Tensor:
        """`[N]`, the loss of each labelled token; the trainer takes the mean over all tokens of a step."""
        raise NotImplementedError


def label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`[N]`, cross-entropy of `logits [N, vocabulary]`, in fp32 at least."""
    return cross_entropy(at_least_float32(logits), labels, reduction="none")


def weighted_label_losses(exits: TeacherForcedExits, weights: Mapping[int, float]) -> torch.Tensor:
    """`[N]`, sum over layers of weight times cross-entropy. A head whose weight is 0 is not run."""
    losses = [weight * label_loss(exits.logits(layer), exits.labels) for layer, weight in weights.items() if weight]
    return torch.stack(losses).sum(dim=0)


def normalized(weights: Mapping[int, float]) -> dict[int, float]:
    """The weights scaled to sum 1."""
    total = sum(weights.values())
    return {layer: weight / total for layer, weight in weights.items()}


def soft_loss(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """`[N]`, cross-entropy of `logits [N, vocabulary]` to the probabilities `teacher [N, vocabulary]`."""
    return -(teacher * at_least_float32(logits).log_softmax(dim=-1)).sum(dim=-1)


def last_layer_probabilities(exits: TeacherForcedExits) -> torch.Tensor:
    """`[N, vocabulary]`, the last layer's probabilities of the same pass, as a teacher: detached, in fp32 at least."""
    return at_least_float32(exits.logits(exits.num_layers).detach()).softmax(dim=-1)


def check_share(name: str, value) -> None:
    """Refuse a value that is not a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be a number in [0, 1], got {value!r}.")


def check_choice(name: str, value, choices) -> None:
    """Refuse a value that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")
