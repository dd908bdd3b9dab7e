"""LayerSkip's training: a loss whose weights grow with the square of depth, curricula, layer dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from hf_earlyexit.common.values import is_integer
from hf_earlyexit.generation.teacher_forced import TeacherForcedExits
from hf_earlyexit.training.objectives.objective import (
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
    """LayerSkip's early-exit loss (arXiv 2404.16710, section 4.1). Trains the whole model except exit classifiers.

    With layers l counted from 0 to L - 1, the weight of a layer is e_scale l (l + 1) / 2, and that of the last one is
    L - 1 + e_scale (L - 2)(L - 1) / 2. The weights of the layers active in a step are scaled to sum 1. The first layer
    has weight 0. The paper has an exit after every layer; here the exit points of this model are used. The last layer
    is active in every step.

    Layers are skipped per row (stochastic depth), at the rates of `layer_dropout`. Skipped rows are not computed, and
    kept rows are not rescaled.

    Args:
        e_scale: Weight of the exits relative to the last layer; the paper uses 0.1 to 1.
        curriculum: Which exit points are active in a step. `"rotational"`: every `rotation`-th, shifted by one each
            step, so that a step runs few heads. `"gradual"`: the last layers first, one layer more every T / 2L of T
            steps, all in the second half. `"all"`: always all, which the paper found to be slow and bad for the last
            layer.
        rotation: R of the rotational curriculum.
        max_layer_dropout: p_max, the rate of the last layer. Layer l has exp(l ln 2 / (L - 1)) - 1 times that rate,
            the first layer 0. The paper uses 0.1 to 0.2, with a higher learning rate.
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

    def token_losses(self, exits: TeacherForcedExits) -> torch.Tensor:
        return weighted_label_losses(exits, self.weights(exits.layers, exits.num_layers))

    def weights(self, exit_layers: Sequence[int], num_layers: int) -> dict[int, float]:
        """The weights of the layers (as counts of layers run) active in this step, with sum 1."""
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
    """Rises from 0 at the first place to 1 at the last; 1 plus the value doubles exponentially."""
    return math.exp(place * math.log(2) / max(1, count - 1)) - 1
