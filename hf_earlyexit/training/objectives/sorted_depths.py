"""Sorted fine-tuning: several sub-depths of one model, trained with equal weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_earlyexit.exits.config import EarlyExitConfig, check_exit_layers
from hf_earlyexit.generation.teacher_forced import TeacherForcedExits
from hf_earlyexit.training.objectives.objective import Objective, weighted_label_losses


@dataclass(frozen=True)
class SortedDepths(Objective):
    """Plain mean of the cross-entropies of chosen sub-depths and of the last layer (Sorted fine-tuning).

    Sources: SoFT, arXiv 2309.08968; LITE, arXiv 2310.18581, is the same. Trains the whole model except exit
    classifiers. Exit points that are not chosen have no loss of their own.

    Args:
        depths: Exit points to train, ascending; None for all. The last layer is always included, as the largest
            sub-model is in the paper.
    """

    depths: Sequence[int] | None = None

    def __post_init__(self):
        if self.depths is not None:
            check_exit_layers(self.depths)
            object.__setattr__(self, "depths", tuple(self.depths))

    def check(self, config: EarlyExitConfig) -> None:
        if self.depths is None:
            return
        if unknown := sorted(set(self.depths) - set(config.exit_layers)):
            raise ValueError(f"`depths` has {unknown}, which are no exit points: {list(config.exit_layers)}.")

    def token_losses(self, exits: TeacherForcedExits) -> torch.Tensor:
        depths = exits.layers if self.depths is None else self.depths
        share = 1 / (len(depths) + 1)
        return weighted_label_losses(exits, dict.fromkeys((*depths, exits.num_layers), share))
