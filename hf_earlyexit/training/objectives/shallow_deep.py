"""FREE's training: a shallow and a deep model in one, with layers of the deep one as teachers of the shallow one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_earlyexit.common.values import is_integer, is_number
from hf_earlyexit.exits.config import EarlyExitConfig
from hf_earlyexit.exits.criteria import at_least_float32
from hf_earlyexit.generation.teacher_forced import TeacherForcedExits
from hf_earlyexit.training.objectives.objective import Objective, check_choice, weighted_label_losses


ALIGNMENTS = ("dynamic", "uniform", "last")


@dataclass(frozen=True)
class ShallowDeep(Objective):
    """FREE's loss (arXiv 2310.05424, section 4.1): (S CE_S + L CE_L) / (S + L) + alpha KD.

    The shallow model has S of the L layers. Trains the whole model except exit classifiers.

    KD is a mean squared error between hidden states after the final norm, of shallow layers (students) and detached
    deep ones (teachers), which are the S layers round(L i / S), i = 1 to S. FREE's released code aligns them once per
    batch. Here each token has its own alignment, so that the loss does not depend on how rows are split into batches.

    Args:
        shallow: S, an exit point; the first one if None. FREE uses a quarter to a third of the layers.
        alpha: Weight of KD.
        alignment: `"dynamic"`: from the deepest teacher down, each gets the student with the smallest error among
            those below the previously aligned one. `"uniform"`: teacher i is aligned with layer i. `"last"`: L with S
            only.
    """

    shallow: int | None = None
    alpha: float = 0.5
    alignment: str = "dynamic"

    def __post_init__(self):
        if self.shallow is not None and not (is_integer(self.shallow) and self.shallow >= 1):
            raise ValueError(f"`shallow` must be an exit point or None, got {self.shallow!r}.")
        if not (is_number(self.alpha) and self.alpha >= 0):
            raise ValueError(f"`alpha` must be a number from 0 on, got {self.alpha!r}.")
        check_choice("alignment", self.alignment, ALIGNMENTS)

    def check(self, config: EarlyExitConfig) -> None:
        if not config.exit_layers:
            raise ValueError("This model has no exit points: it needs one, after the shallow part.")
        if self.shallow not in (None, *config.exit_layers):
            raise ValueError(f"`shallow={self.shallow}` is no exit point of this model: {list(config.exit_layers)}.")

    def token_losses(self, exits: TeacherForcedExits) -> torch.Tensor:
        shallow, deep = self.shallow or exits.layers[0], exits.num_layers
        weights = {shallow: shallow / (shallow + deep), deep: deep / (shallow + deep)}
        losses = weighted_label_losses(exits, weights)
        return losses + self.alpha * self._distillation(exits, shallow) if self.alpha else losses

    def _distillation(self, exits: TeacherForcedExits, shallow: int) -> torch.Tensor:
        if self.alignment == "last":
            return squared_errors(exits, [shallow], [exits.num_layers])[:, 0, 0]
        students = list(range(1, shallow + 1))
        errors = squared_errors(exits, students, [round(exits.num_layers * one / shallow) for one in students])
        if self.alignment == "uniform":
            return errors.diagonal(dim1=1, dim2=2).mean(dim=1)
        return aligned_errors(errors)


def squared_errors(exits: TeacherForcedExits, students: list[int], teachers: list[int]) -> torch.Tensor:
    """`[N, students, teachers]`, mean over the width of squared differences; teachers are detached."""
    taught = torch.stack([at_least_float32(exits.normed(layer)) for layer in students], dim=1)
    teaching = torch.stack([at_least_float32(exits.normed(layer).detach()) for layer in teachers], dim=1)
    return (taught[:, :, None] - teaching[:, None]).square().mean(dim=-1)


def aligned_errors(errors: torch.Tensor) -> torch.Tensor:
    """`[N]`, mean of the errors of FREE's dynamic alignment in `errors [N, students, teachers]`.

    From the last teacher down, each gets the student with the smallest error among those below the previously aligned
    one. A teacher with no student left is not used.
    """
    count = errors.shape[1]
    students = torch.arange(count, device=errors.device)
    bound = errors.new_full((len(errors), 1), count)
    total, taken = errors.new_zeros(len(errors)), errors.new_zeros(len(errors))
    for teacher in reversed(range(errors.shape[2])):
        allowed = students < bound
        column = errors[:, :, teacher]
        choice = column.detach().masked_fill(~allowed, torch.inf).argmin(dim=1, keepdim=True)
        there = allowed.any(dim=1)
        total = total + torch.where(there, column.gather(1, choice)[:, 0], 0.0)
        taken = taken + there
        bound = torch.where(there[:, None], choice.to(bound.dtype), bound)
    return total / taken
