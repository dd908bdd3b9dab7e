"""The weighted cross-entropy of all exits, CALM's training objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_earlyexit.generation.teacher_forced import TeacherForcedExits
from hf_earlyexit.training.objectives.objective import (
    Objective,
    check_choice,
    check_share,
    label_loss,
    last_layer_probabilities,
    soft_loss,
)


def linear_weights(layers: Sequence[int]) -> list[float]:
    """Weights proportional to the layer: `layer / sum of layers`."""
    return [layer / sum(layers) for layer in layers]


def uniform_weights(layers: Sequence[int]) -> list[float]:
    """Equal weights: `1 / number of layers`."""
    return [1 / len(layers)] * len(layers)


WEIGHTS = {"linear": linear_weights, "uniform": uniform_weights}


@dataclass(frozen=True)
class MultiExit(Objective):
    """Weighted cross-entropy of every exit point and of the last layer, CALM's objective (arXiv 2207.07061).

    Trains the whole model except exit classifiers.

    Args:
        weights: `"linear"`, proportional to the layer (CALM's), or `"uniform"`. They sum to 1. CALM has an exit after
            every layer; here the sum is over this model's exit points and its last layer.
        last_again: Add the last layer's loss once more, with weight 1 (DEED, arXiv 2311.08623), to protect the quality
            of full depth.
        distillation: Share of an exit's loss, from 0 to 1, that is its cross-entropy to the last layer's
            probabilities, of the same pass and detached, in place of the label. Exits then learn the output of this
            model instead of given texts.
    """

    weights: str = "linear"
    last_again: bool = False
    distillation: float = 0.0

    def __post_init__(self):
        check_choice("weights", self.weights, WEIGHTS)
        if not isinstance(self.last_again, bool):
            raise ValueError(f"`last_again` must be True or False, got {self.last_again!r}.")
        check_share("distillation", self.distillation)

    def token_losses(self, exits: TeacherForcedExits) -> torch.Tensor:
        *weights, last_weight = WEIGHTS[self.weights]((*exits.layers, exits.num_layers))
        teacher = last_layer_probabilities(exits) if self.distillation else None
        total = (last_weight + self.last_again) * label_loss(exits.logits(exits.num_layers), exits.labels)
        for weight, layer in zip(weights, exits.layers, strict=True):
            total = total + weight * self._exit_losses(exits.logits(layer), exits.labels, teacher)
        return total

    def _exit_losses(self, logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None) -> torch.Tensor:
        of_label = label_loss(logits, labels)
        return of_label if teacher is None else torch.lerp(of_label, soft_loss(logits, teacher), self.distillation)
