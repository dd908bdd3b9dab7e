"""Answers for LayerSkip's training: a loss that grows with the square of depth, curricula, layer dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from hf_earlyexit.config import is_integer
from hf_earlyexit.labelled import LabelledExits
from hf_earlyexit.objectives.objective import (
    Objective,
    check_choice,
    check_share,
    normalized,
    weighted_label_losses,
)


CURRICULA = ("rotational", "gradual", "all")
DROPOUT_SCHEDULES = ("constant", "exponential")


@dataclass(frozen=True)
class LayerSkip(Objective):
    """LayerSkip's early-exit loss (arXiv 2404.16710, section 4.1). The whole model moves except exit classifiers.

    With layers l counted from 0 to L - 1, the weight of a layer is e_scale l (l + 1) / 2, of the last one
    L - 1 + e_scale (L - 2)(L - 1) / 2; weights of the layers that take part in a step are scaled to sum 1. The first
    layer has weight 0. The paper has an exit after every layer; here the exit points of this model take part, and the
    last layer in every step, so that no step is without it.

    Layers are left out per row (stochastic depth), as `layer_dropout`'s rates say; rows left out are not computed, and
    rows kept are not rescaled.

    Args:
        e_scale: How much the exits weigh against the last layer; the paper uses 0.1 to 1.
        curriculum: Which exit points take part in a step. `"rotational"`: every `rotation`-th, moving on by one each
            step, so that a step runs few heads. `"gradual"`: the last layers first, one layer more every T / 2L of T
            steps, all in the second half. `"all"`: always all, which the paper found to be slow and bad for the last
            layer.
        rotation: R of the rotational curriculum.
        max_layer_dropout: p_max, the rate of the last layer; layer l has exp(l ln 2 / (L - 1)) - 1 of it, the first 0.
            The paper uses 0.1 to 0.2, with a higher learning rate.
        dropout_schedule: `"constant"`, for fine-tuning, or `"exponential"` over the steps, exp(t ln 2 / (T - 1)) - 1,
            for training from scratch.
        step, steps: t and T. The trainer sets them.
    """

    e_scale: float = 1.0
    curriculum: str = "rotational"
    rotation: int = 2
    max_layer_dropout: float = 0.0
    dropout_schedule: str = "constant"
    step: int = field(default=0, repr=False)
    steps: int = field(default=1, repr=False)

    def __post_init__(self):
        check_share("e_scale", self.e_scale)
        check_choice("curriculum", self.curriculum, CURRICULA)
        if not is_integer(self.rotation) or self.rotation < 1:
            raise ValueError(f"`rotation` must be a positive integer, got {self.rotation!r}.")
        check_share("max_layer_dropout", self.max_layer_dropout)
        check_choice("dropout_schedule", self.dropout_schedule, DROPOUT_SCHEDULES)

    def at(self, step: int, steps: int) -> LayerSkip:
        return replace(self, step=step, steps=steps)

    def layer_dropout(self, num_layers: int) -> list[float]:
        if not self.max_layer_dropout:
            return []
        of_time = 1.0 if self.dropout_schedule == "constant" else _doubling(self.step, self.steps)
        return [of_time * _doubling(layer, num_layers) * self.max_layer_dropout for layer in range(num_layers)]

    def token_losses(self, exits: LabelledExits) -> torch.Tensor:
        return weighted_label_losses(exits, self.weights(exits.layers, exits.num_layers))

    def weights(self, exit_layers: Sequence[int], num_layers: int) -> dict[int, float]:
        """Of the layers (as counts of layers run) that take part in this step, with sum 1."""
        taking_part = [layer for place, layer in enumerate(exit_layers) if self._takes_part(place, layer, num_layers)]
        weights = {layer: self.e_scale * (layer - 1) * layer / 2 for layer in taking_part}
        weights[num_layers] = num_layers - 1 + self.e_scale * (num_layers - 2) * (num_layers - 1) / 2
        return normalized(weights)

    def _takes_part(self, place: int, layer: int, num_layers: int) -> bool:
        if self.curriculum == "rotational":
            return place % self.rotation == self.step % self.rotation
        if self.curriculum == "gradual":
            return layer >= num_layers - self.step * 2 * num_layers // self.steps
        return True


def _doubling(place: int, count: int) -> float:
    """From 0 at the first place to 1 at the last, its increments growing exponentially by 2 over all."""
    return math.exp(place * math.log(2) / max(1, count - 1)) - 1
