"""Answers for what exits said in one `generate` call, and whether they were right: an `ExitRun` that writes it down.

Only made where it is asked for (`record_exits`): every exit then meets the vocabulary head, whatever its criterion.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_earlyexit.policies import ExitPoint
from hf_earlyexit.rows import Rows
from hf_earlyexit.run import ExitRun
from hf_earlyexit.settings import ExitSettings
from hf_earlyexit.transfer import to_host


class WatchedRun(ExitRun):
    """A run that remembers every answer; without early exit it asks all the same, and nobody leaves.

    Args:
        settings: Of the call.
        args, kwargs: As for `ExitRun`.
    """

    def __init__(self, settings: ExitSettings, *args, **kwargs):
        super().__init__(settings, *args, **kwargs)
        self.may_leave = settings.early_exit
        self._answers: list[list[tuple[int, int, float, int]]] = []  # by step: row, layer, confidence, first choice
        self._written: list[list[int]] = []  # by step: what the logits of each row say in the end

    def begin_step(self, length: int) -> Rows:
        self._answers.append([])
        self._written.append([-1] * self.batch_size)
        return super().begin_step(length)

    def leavers(self, point: ExitPoint) -> list[int]:
        if self.may_leave:
            return super().leavers(point)
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
        """1 or 0; NaN of a token that left, since nobody knows what full depth would have said."""
        if self.steps[step].layers[row] < self.num_layers:
            return float("nan")
        return float(choice == self._written[step][row])

    def _by_layer(self, value) -> torch.Tensor:
        """`[batch, steps, L - 1]`, fp32; NaN where nobody was asked."""
        table = torch.full((self.batch_size, len(self.steps), self.num_layers - 1), float("nan"))
        for step, answers in enumerate(self._answers):
            for row, layer, confidence, choice in answers:
                table[row, step, layer - 1] = value(step, row, confidence, choice)
        return table


def labelled_confidences(output: Any, layer: int | None = None) -> tuple[list[float], list[bool]]:
    """What the exits said of tokens that ran all layers, and of each whether its first choice was full depth's.

    Args:
        output: Of `generate(record_exits=True, return_dict_in_generate=True)`.
        layer: Of this exit alone; None: of all that were asked.

    Only of texts at full depth are these full depth's choices: where tokens have left, keys and values of the last
    layer are projected.

    Raises:
        ValueError: Nothing was recorded, or nobody was asked after `layer`.
    """
    confidences, agreements = output.get("asked_confidences"), output.get("asked_agreements")
    if confidences is None:
        raise ValueError("`output` has no recorded exits: pass `record_exits=True` to `generate`.")
    if layer is not None:
        if not 1 <= layer <= confidences.shape[-1] or confidences[..., layer - 1].isnan().all():
            raise ValueError(f"`layer={layer}` is no exit that was asked in this call.")
        confidences, agreements = confidences[..., layer - 1], agreements[..., layer - 1]
    known = agreements.isnan().logical_not()
    return confidences[known].tolist(), agreements[known].bool().tolist()
