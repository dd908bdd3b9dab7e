"""An `ExitRun` that records every exit's confidence and whether its first choice agreed with full depth.

Used only with `record_exits=True`, since it evaluates the vocabulary head at every exit, whatever the criterion.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_earlyexit.common.transfer import to_host
from hf_earlyexit.decoding.run import ExitRun
from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.exits.criteria import ExitPoint
from hf_earlyexit.kernels.rows import Rows


class RecordedRun(ExitRun):
    """A run that records every evaluated exit. Without early exit, exits are still evaluated but no row exits.

    Args:
        settings: Settings of the call.
        args, kwargs: As for `ExitRun`.
    """

    def __init__(self, settings: ExitSettings, *args, **kwargs):
        super().__init__(settings, *args, **kwargs)
        self.may_leave = settings.early_exit
        self._answers: list[list[tuple[int, int, float, int]]] = []  # by step: row, layer, confidence, first choice
        self._written: list[list[int]] = []  # by step: the top token of each row's final logits

    def begin_step(self, length: int) -> Rows:
        self._answers.append([])
        self._written.append([-1] * self.batch_size)
        return super().begin_step(length)

    def exiting(self, point: ExitPoint) -> list[int]:
        if self.may_leave:
            return super().exiting(point)
        self._confidences(point)
        return []

    def _confidences(self, point: ExitPoint) -> list[float]:
        confidences = super()._confidences(point)
        answers = zip(point.rows, confidences, to_host(point.first_choices()), strict=True)
        self._answers[-1] += [(row, point.layer, confidence, choice) for row, confidence, choice in answers]
        return confidences

    def see_logits(self, logits: torch.Tensor) -> None:
        self._written[-1] = to_host(logits[:, -1].argmax(dim=-1))

    def per_token(self) -> dict[str, torch.Tensor]:
        return super().per_token() | {
            "asked_confidences": self._by_layer(lambda step, row, confidence, choice: confidence),
            "asked_agreements": self._by_layer(self._agreement),
        }

    def _agreement(self, step: int, row: int, confidence: float, choice: int) -> float:
        """1 or 0; NaN for a token that exited early, since its full-depth choice is unknown."""
        if self.steps[step].layers[row] < self.num_layers:
            return float("nan")
        return float(choice == self._written[step][row])

    def _by_layer(self, value) -> torch.Tensor:
        """`[batch, steps, L - 1]`, fp32; NaN where no exit was evaluated."""
        table = torch.full((self.batch_size, len(self.steps), self.num_layers - 1), float("nan"))
        for step, answers in enumerate(self._answers):
            for row, layer, confidence, choice in answers:
                table[row, step, layer - 1] = value(step, row, confidence, choice)
        return table


def labelled_confidences(output: Any, layer: int | None = None) -> tuple[list[float], list[bool]]:
    """Exit confidences for tokens that ran all layers, and whether each exit's first choice was that of full depth.

    Labels are exact only if no token exited; after an exit, upper-layer keys and values are approximations.

    Args:
        output: Output of `generate(record_exits=True, return_dict_in_generate=True)`.
        layer: Use this exit only; None: all evaluated exits.

    Raises:
        ValueError: Nothing was recorded, or no exit was evaluated after `layer`.
    """
    confidences, agreements = output.get("asked_confidences"), output.get("asked_agreements")
    if confidences is None:
        raise ValueError("`output` has no recorded exits: pass `record_exits=True` to `generate`.")
    if layer is not None:
        if not 1 <= layer <= confidences.shape[-1] or confidences[..., layer - 1].isnan().all():
            raise ValueError(f"`layer={layer}` is not an exit point that was evaluated in this call.")
        confidences, agreements = confidences[..., layer - 1], agreements[..., layer - 1]
    known = agreements.isnan().logical_not()
    return confidences[known].tolist(), agreements[known].bool().tolist()
