"""Self-distillation of exit heads: a frozen model's heads learn its last layer's output, without reference labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_earlyexit.exits.config import EarlyExitConfig
from hf_earlyexit.generation.teacher_forced import TeacherForcedExits
from hf_earlyexit.training.objectives.objective import (
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
    """Exit heads on a frozen model, trained towards its last layer's output on the same text.

    Sources: Kangaroo, arXiv 2404.18911; EESD, arXiv 2406.03853; self-supervised early exits, arXiv 2407.21082. Plain
    mean over the exit points. Only the heads' own weights are trained, so full depth stays bit-identical. Labels only
    select the texts to read and are not learnt: with the model's own outputs as labels (`scripts/train_exits.py
    --own_outputs`) no references are needed. The papers add whole layers or adapters; here the heads are those of
    `EarlyExitConfig.heads`.

    Args:
        towards: `"probabilities"`: cross-entropy to the last layer's probabilities. `"kl"`: the same minus their
            entropy, with the same gradients, and 0 if the exit's probabilities are equal. `"choice"`: cross-entropy to
            the last layer's first choice alone.
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

    def token_losses(self, exits: TeacherForcedExits) -> torch.Tensor:
        if self.towards == "choice":
            losses = [label_loss(exits.logits(layer), exits.full_depth_choices) for layer in exits.layers]
            return torch.stack(losses).mean(dim=0)
        teacher = last_layer_probabilities(exits)
        losses = torch.stack([soft_loss(exits.logits(layer), teacher) for layer in exits.layers]).mean(dim=0)
        return losses if self.towards == "probabilities" else losses + torch.xlogy(teacher, teacher).sum(dim=-1)
