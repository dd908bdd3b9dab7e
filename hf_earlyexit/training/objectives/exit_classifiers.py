"""Objectives for exit classifiers on a frozen model, with three published losses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from hf_earlyexit.common.values import is_integer
from hf_earlyexit.exits.config import EarlyExitConfig
from hf_earlyexit.generation.teacher_forced import TeacherForcedExits
from hf_earlyexit.training.objectives.objective import CLASSIFIER_PREFIX, Objective


class OfClassifiers(Objective):
    """An objective that trains the exit classifiers only."""

    trains_classifiers = True

    def check(self, config: EarlyExitConfig) -> None:
        if config.classifier is None:
            raise ValueError(
                "This model has no exit classifiers to train: load it with "
                "`early_exit=EarlyExitConfig(classifier=ClassifierConfig())`."
            )

    def moves(self, parameter: str) -> bool:
        return parameter.startswith(CLASSIFIER_PREFIX)


@dataclass(frozen=True)
class ExitClassifiers(OfClassifiers):
    """Exit classifiers on a frozen model (CALM, arXiv 2207.07061, its "independent" objective).

    A classifier learns whether its exit point predicts the same token as the last layer. Binary cross-entropy, plain
    mean over the exit points.

    Args:
        balanced: Weight the two labels so that both contribute equally at every exit point. With a the share of tokens
            that agree, these have weight 1 - a, the others a. CALM's released code computes the share for each batch.
            Here it is measured once, before training, so that the loss does not depend on how tokens are split into
            batches. At an exit point where all tokens agreed, or none, there is nothing to balance, and both weights
            are 1.
        agreement: The share of each exit point, in order; measured by the trainer if None.
    """

    balanced: bool = True
    agreement: tuple[float, ...] | None = field(default=None, repr=False)

    def check(self, config: EarlyExitConfig) -> None:
        super().check(config)
        if self.agreement is not None and len(self.agreement) != len(config.exit_layers):
            raise ValueError(
                f"`agreement` has {len(self.agreement)} shares for {len(config.exit_layers)} exit points: "
                f"{list(config.exit_layers)}."
            )

    def prepared(self, agreement: dict[int, float]) -> ExitClassifiers:
        if self.agreement is not None:
            return self
        return replace(self, agreement=tuple(agreement[layer] for layer in sorted(agreement)))

    def token_losses(self, exits: TeacherForcedExits) -> torch.Tensor:
        losses = [self._layer_losses(exits, place, layer) for place, layer in enumerate(exits.layers)]
        return torch.stack(losses).mean(dim=0)

    def _layer_losses(self, exits: TeacherForcedExits, place: int, layer: int) -> torch.Tensor:
        agrees = exits.agrees(layer).float()
        losses = binary_cross_entropy_with_logits(exits.exit_logits(layer), agrees, reduction="none")
        share = self.agreement[place] if self.balanced else None
        if share in (None, 0, 1):
            return losses
        return losses * (agrees * (1 - share) + (1 - agrees) * share)


@dataclass(frozen=True)
class GeometricClassifiers(OfClassifiers):
    """Classifiers that jointly predict where a token first exits (CALM's "geometric-like" objective).

    The objective follows Elbayad et al., arXiv 1910.10073. Let q_i be the exit probability that the classifier of exit
    point i gives. A token exits first at i with probability q_i times the product of 1 - q_j over the exit points j
    before, and runs to the last layer with the product of all 1 - q_j. The loss is the cross-entropy to the first exit
    point whose first choice is the last layer's. CALM found the independent objective better.
    """

    def token_losses(self, exits: TeacherForcedExits) -> torch.Tensor:
        agrees = torch.stack([exits.agrees(layer) for layer in exits.layers], dim=-1)
        logits = torch.stack([exits.exit_logits(layer) for layer in exits.layers], dim=-1)
        seen = agrees.cumsum(dim=-1)
        stays, leaves = seen == 0, agrees & (seen == 1)
        return -(logsigmoid(-logits) * stays + logsigmoid(logits) * leaves).sum(dim=-1)


@dataclass(frozen=True)
class RelaxedClassifiers(OfClassifiers):
    """Classifiers with a relaxed label: the first choice is among the last layer's top k (DYNAMAX, arXiv 2504.20922).

    Binary cross-entropy; weights fall linearly from the first exit point to the last, with sum 1. With relaxed labels
    a token may exit although full depth would have chosen another one. DYNAMAX puts exits into the second half of the
    layers only (`EarlyExitConfig.exit_layers`) and also has classifiers with a feed-forward or Mamba block.

    Args:
        top_k: How many of the last layer's choices are accepted; 1 is agreement.
    """

    top_k: int = 5

    def __post_init__(self):
        if not is_integer(self.top_k) or self.top_k < 1:
            raise ValueError(f"`top_k` must be a positive integer, got {self.top_k!r}.")

    def token_losses(self, exits: TeacherForcedExits) -> torch.Tensor:
        count = len(exits.layers)
        accepted = exits.logits(exits.num_layers).topk(self.top_k, dim=-1).indices
        total = 0.0
        for place, layer in enumerate(exits.layers):
            will_do = (exits.choices(layer)[:, None] == accepted).any(dim=-1).float()
            losses = binary_cross_entropy_with_logits(exits.exit_logits(layer), will_do, reduction="none")
            total = total + 2 * (count - place) / (count * (count + 1)) * losses
        return total
