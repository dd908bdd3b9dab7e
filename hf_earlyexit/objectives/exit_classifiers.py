"""Answers for exit classifiers on a frozen model: what they learn to say, by three published losses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from hf_earlyexit.config import EarlyExitConfig, is_integer
from hf_earlyexit.labelled import LabelledExits
from hf_earlyexit.objectives.objective import CLASSIFIER_PREFIX, Objective


class OfClassifiers(Objective):
    """An objective that moves the exit classifiers and nothing else."""

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

    A classifier learns whether its exit point would write the same token as the last layer. Binary cross-entropy,
    plain mean over the exit points.

    Args:
        balanced: Weigh the two labels so that both count alike at every exit point: those that agree by 1 - a, the
            others by a, where a is the share that agrees. CALM's released code takes a of each batch; here it is
            measured once, before training, so that the loss does not depend on how tokens are dealt into batches. At
            an exit point where all agreed, or none, there is nothing to balance, and both count 1.
        agreement: a of each exit point, in order; the trainer measures it if it is None.
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

    def token_losses(self, exits: LabelledExits) -> torch.Tensor:
        losses = [self._layer_losses(exits, place, layer) for place, layer in enumerate(exits.layers)]
        return torch.stack(losses).mean(dim=0)

    def _layer_losses(self, exits: LabelledExits, place: int, layer: int) -> torch.Tensor:
        agrees = exits.agrees(layer).float()
        losses = binary_cross_entropy_with_logits(exits.exit_logits(layer), agrees, reduction="none")
        share = self.agreement[place] if self.balanced else None
        if share in (None, 0, 1):
            return losses
        return losses * (agrees * (1 - share) + (1 - agrees) * share)


@dataclass(frozen=True)
class GeometricClassifiers(OfClassifiers):
    """Classifiers that together say where a token leaves first (CALM's "geometric-like" objective, after Elbayad et
    al., arXiv 1910.10073).

    With q_i the probability that exit point i says "leave", a token leaves first at i with probability
    q_i times the product of 1 - q_j over the exit points j before, and at the last layer with that of all of them.
    Cross-entropy to the first exit point whose first choice is the last layer's. CALM found the independent objective
    better.
    """

    def token_losses(self, exits: LabelledExits) -> torch.Tensor:
        agrees = torch.stack([exits.agrees(layer) for layer in exits.layers], dim=-1)
        logits = torch.stack([exits.exit_logits(layer) for layer in exits.layers], dim=-1)
        seen = agrees.cumsum(dim=-1)
        stays, leaves = seen == 0, agrees & (seen == 1)
        return -(logsigmoid(-logits) * stays + logsigmoid(logits) * leaves).sum(dim=-1)


@dataclass(frozen=True)
class RelaxedClassifiers(OfClassifiers):
    """Classifiers with a relaxed label (DYNAMAX, arXiv 2504.20922): an exit point may be left if its first choice is
    among the `top_k` of the last layer.

    Binary cross-entropy; weights fall linearly from the first exit point to the last, with sum 1. With relaxed labels
    a token may leave that full depth would have written otherwise. DYNAMAX puts exits into the second half of the
    layers only (`EarlyExitConfig.exit_layers`) and also has classifiers with a feed-forward or Mamba block.

    Args:
        top_k: How many of the last layer's choices will do; 1 is agreement.
    """

    top_k: int = 5

    def __post_init__(self):
        if not is_integer(self.top_k) or self.top_k < 1:
            raise ValueError(f"`top_k` must be a positive integer, got {self.top_k!r}.")

    def token_losses(self, exits: LabelledExits) -> torch.Tensor:
        count = len(exits.layers)
        accepted = exits.logits(exits.num_layers).topk(self.top_k, dim=-1).indices
        total = 0.0
        for place, layer in enumerate(exits.layers):
            will_do = (exits.choices(layer)[:, None] == accepted).any(dim=-1).float()
            losses = binary_cross_entropy_with_logits(exits.exit_logits(layer), will_do, reduction="none")
            total = total + 2 * (count - place) / (count * (count + 1)) * losses
        return total
