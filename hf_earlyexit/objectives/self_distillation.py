"""Answers for heads that learn what the model itself says, with nothing else moving and no labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_earlyexit.config import EarlyExitConfig
from hf_earlyexit.labelled import LabelledExits
from hf_earlyexit.objectives.objective import (
    HEAD_PREFIX,
    Objective,
    check_choice,
    label_loss,
    last_layer_probabilities,
    soft_loss,
)


TOWARDS = ("probabilities", "kl", "choice")


@dataclass(frozen=True)
class SelfDistillation(Objective):
    """Exit heads on a frozen model, towards what its last layer says of the same text (Kangaroo, arXiv 2404.18911;
    EESD, arXiv 2406.03853; self-supervised early exits, arXiv 2407.21082).

    Plain mean over the exit points. Only the heads' own weights move, so full depth stays what it is to the bit.
    Labels only say which texts are read, not what is learnt: with the model's own outputs as labels
    (`scripts/train_exits.py --own_outputs`) none are needed. Those papers add whole layers or adapters; here the heads
    are those of `EarlyExitConfig.heads`.

    Args:
        towards: `"probabilities"`, cross-entropy to the last layer's; `"kl"`, the same less their entropy: the same
            gradients, and 0 where the exit says the same; `"choice"`, cross-entropy to its first choice alone.
    """

    towards: str = "probabilities"

    def __post_init__(self):
        check_choice("towards", self.towards, TOWARDS)

    def check(self, config: EarlyExitConfig) -> None:
        if not set(config.heads) - {"shared"}:
            raise ValueError(
                "All exit heads of this model are 'shared', which have no weights of their own: load it with "
                "`early_exit=EarlyExitConfig(heads='linear')` or another kind."
            )

    def moves(self, parameter: str) -> bool:
        return parameter.startswith(HEAD_PREFIX)

    def token_losses(self, exits: LabelledExits) -> torch.Tensor:
        if self.towards == "choice":
            losses = [label_loss(exits.logits(layer), exits.full_depth_choices) for layer in exits.layers]
            return torch.stack(losses).mean(dim=0)
        teacher = last_layer_probabilities(exits)
        losses = torch.stack([soft_loss(exits.logits(layer), teacher) for layer in exits.layers]).mean(dim=0)
        return losses if self.towards == "probabilities" else losses + torch.xlogy(teacher, teacher).sum(dim=-1)
