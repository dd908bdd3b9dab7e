"""Quality of each exit point under teacher forcing: counts of a batch, and the metrics computed from them.

Counts are per batch row, so that rows repeated to fill a process's last batch can be dropped before summing.
"""

from __future__ import annotations

import torch

from hf_earlyexit.exits.config import EarlyExitConfig
from hf_earlyexit.generation.teacher_forced import TeacherForcedExits
from hf_earlyexit.training.objectives.objective import label_loss


COUNTS = ("tokens", "loss", "accurate", "agreeing", "may_leave", "rightly_leave")


class CountExits:
    """An `exit_objective` that returns counts, `[batch, exit points + 1, COUNTS]`, the last layer last.

    Args:
        config: Of the model's exits, fully specified.
    """

    def __init__(self, config: EarlyExitConfig):
        self.classifies = config.classifier is not None

    def __call__(self, exits: TeacherForcedExits) -> torch.Tensor:
        layers = (*exits.layers, exits.num_layers)
        return torch.stack([self._count(exits, layer) for layer in layers], dim=1)

    def _count(self, exits: TeacherForcedExits, layer: int) -> torch.Tensor:
        logits = exits.logits(layer)
        choices = logits.argmax(dim=-1)
        agrees = choices == exits.full_depth_choices
        leaves = torch.zeros_like(agrees)
        if self.classifies and layer < exits.num_layers:
            leaves = exits.exit_logits(layer) >= 0
        tokens = (torch.ones_like(agrees), label_loss(logits, exits.labels), choices == exits.labels, agrees)
        columns = torch.stack([column.float() for column in (*tokens, leaves, leaves & agrees)], dim=-1)
        return columns.new_zeros(exits.batch_size, len(COUNTS)).index_add_(0, exits.rows, columns)


def summarize(counts: torch.Tensor, config: EarlyExitConfig, num_layers: int) -> dict[str, float]:
    """The metrics of each exit point and of the last layer, such as `exit_2_loss`.

    `loss` is in nats per token; the others are shares. `accuracy`: tokens whose label is the head's first choice.
    `agreement`: tokens for which the head's first choice is the last layer's too. For classifiers at probability 0.5,
    `precision` and `recall` are those of agreement, and `f1_stay` is the F1 of the decision not to exit, as CALM
    reports it. NaN if there is nothing to count.

    Args:
        counts: `[exit points + 1, COUNTS]`, summed over all rows.
    """
    report = {}
    for layer, row in zip((*config.exit_layers, num_layers), counts.double().tolist(), strict=True):
        count = dict(zip(COUNTS, row, strict=True))
        values = {
            name: _share(count[key], count["tokens"]) for name, key in (("loss", "loss"), ("accuracy", "accurate"))
        }
        if layer < num_layers:
            values["agreement"] = _share(count["agreeing"], count["tokens"])
            if config.classifier is not None:
                values |= _classifier_report(count)
        report |= {f"exit_{layer}_{name}": value for name, value in values.items()}
    return report


def _classifier_report(count: dict[str, float]) -> dict[str, float]:
    wrongly_leave = count["may_leave"] - count["rightly_leave"]
    wrongly_stay = count["agreeing"] - count["rightly_leave"]
    rightly_stay = count["tokens"] - count["agreeing"] - wrongly_leave
    return {
        "precision": _share(count["rightly_leave"], count["may_leave"]),
        "recall": _share(count["rightly_leave"], count["agreeing"]),
        "f1_stay": _share(2 * rightly_stay, 2 * rightly_stay + wrongly_leave + wrongly_stay),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
