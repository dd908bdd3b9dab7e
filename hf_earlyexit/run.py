"""Answers for the state of one `generate` call: who is alive, who leaves, what was run and what it was worth.

Made when the call starts, handed along with it, read when it ends; nothing of it is kept on a module, so two threads
may generate on one model. Knows nothing of models and caches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import StoppingCriteriaList

from hf_earlyexit.patience import Streaks
from hf_earlyexit.policies import BATCH_RULES, ExitPoint, Shortlist
from hf_earlyexit.rows import Rows
from hf_earlyexit.settings import ExitSettings
from hf_earlyexit.transfer import to_host


class Work:
    """What ran, counted where it ran, by layer (counted from 1).

    Attributes:
        layer_rows: Rows x positions that entered each block.
        filled_positions: Debts paid: positions whose keys and values were projected from a parked state.
        head_rows: Rows that met the vocabulary head after each layer.
        candidate_rows: Rows of the head's weights that were scored besides: rows of the batch x their candidates.
    """

    def __init__(self):
        self.layer_rows: Counter[int] = Counter()
        self.filled_positions: Counter[int] = Counter()
        self.head_rows: Counter[int] = Counter()
        self.candidate_rows: Counter[int] = Counter()


@dataclass
class StepRecord:
    """One decoding step: for every row the layers it ran and the confidence it left with, 0 and NaN where none."""

    layers: list[int]
    confidences: list[float]


class ExitRun:
    """One `generate` call.

    Args:
        settings: Of the call.
        exit_points: Layers at which rows are asked.
        num_layers: Of the decoder.
        batch_size: Rows, beams and returned sequences counted.
        max_length: Decoder ids at most, prompt and new tokens.
        device: Of the model.

    Attributes:
        shortlist: The candidates of the rows for the token of this step.
        streaks: What the rows have said of it so far, and how often in a row.
    """

    def __init__(
        self,
        settings: ExitSettings,
        exit_points: Collection[int],
        num_layers: int,
        batch_size: int,
        max_length: int,
        device: torch.device | str,
    ):
        self.exit_points = exit_points
        self.num_layers, self.batch_size, self.device = num_layers, batch_size, device
        self.max_length = max_length
        if exit_points:
            self.criterion, self.schedule = settings.criterion, settings.schedule
            self.rule = BATCH_RULES[settings.batch_exit]
        self.work = Work()
        self.steps: list[StepRecord] = []
        self._finished: Sequence[bool] = [False] * batch_size
        self._live = Rows.everyone(batch_size, device)

    # --- a step -----------------------------------------------------------------------------------------------------

    def begin_step(self, length: int) -> Rows:
        """Open the record of a new token; returns the rows that still generate.

        Args:
            length: Decoder ids handed in: the prompt's at the first step.
        """
        if not self.steps:
            self.prompt_length = length
        if any(self._finished[row] for row in self._live):
            self._live = Rows([row for row in self._live if not self._finished[row]], self.batch_size, self.device)
        self.steps.append(StepRecord([0] * self.batch_size, [float("nan")] * self.batch_size))
        self._has_passed = set()
        self.shortlist, self.streaks = Shortlist(), Streaks()
        return self._live

    @property
    def live(self) -> Rows:
        """The rows of the last step."""
        return self._live

    def leavers(self, point: ExitPoint) -> list[int]:
        """The places, among the rows of `point`, of those that leave here. One read of the device, and one more where
        rows that pass were judged by candidates."""
        confidences = self._confidences(point)
        thresholds = [self._threshold(position) for position in point.positions]
        passed = point.confirm(
            [confidence >= threshold for confidence, threshold in zip(confidences, thresholds, strict=True)]
        )
        self._has_passed.update(row for row, ok in zip(point.rows, passed, strict=True) if ok)
        leave = self.rule(passed, [row in self._has_passed for row in point.rows])
        leaving = [place for place, leaves in enumerate(leave) if leaves]
        for place in leaving:
            self.record(point.rows[place], point.layer, confidences[place])
        return leaving

    def _confidences(self, point: ExitPoint) -> list[float]:
        if point.answer is not None:
            return point.answer
        confidence = self.criterion.confidence(point)
        if not isinstance(confidence, torch.Tensor) or confidence.shape != (len(point.rows),):
            found = list(confidence.shape) if isinstance(confidence, torch.Tensor) else type(confidence).__name__
            raise ValueError(
                f"`exit_criterion` {type(self.criterion).__name__} must give a tensor of shape [{len(point.rows)}], "
                f"one confidence per row asked about, got {found}."
            )
        return to_host(confidence)

    def _threshold(self, position: int) -> float:
        token = position - (self.prompt_length - 1)
        return self.schedule.threshold_at(token, max(1, self.max_length - self.prompt_length))

    def record(self, row: int, layer: int, confidence: float = float("nan")) -> None:
        """`row` ran `layer` layers for the token of this step."""
        step = self.steps[-1]
        step.layers[row], step.confidences[row] = layer, confidence

    def record_finished(self, finished: Sequence[bool]) -> None:
        """Rows that the stopping criteria have ended by now, one flag per row; they run nothing any more."""
        self._finished = [before or now for before, now in zip(self._finished, finished, strict=True)]

    def see_logits(self, logits: torch.Tensor) -> None:
        """What the step has come to, `[batch, 1, vocabulary]`; of no interest to a run that is not watched."""

    # --- the result -------------------------------------------------------------------------------------------------

    def layers_run(self) -> torch.Tensor:
        """`[batch, steps]`, integers."""
        return torch.tensor([step.layers for step in self.steps], dtype=torch.long).reshape(-1, self.batch_size).T

    def exit_confidences(self) -> torch.Tensor:
        """`[batch, steps]`, fp32; NaN where the row did not leave early."""
        return torch.tensor([step.confidences for step in self.steps]).reshape(-1, self.batch_size).T

    def per_token(self) -> dict[str, torch.Tensor]:
        """What is reported of each token, `[batch, steps, ...]` by name."""
        return {"layers_run": self.layers_run(), "exit_confidences": self.exit_confidences()}

    def work_by_layer(self) -> dict[str, torch.Tensor]:
        """The counts as tensors: `layer_rows` and `filled_positions [L]`, `head_rows` and `candidate_rows [L + 1]`."""
        layers = range(1, self.num_layers + 1)
        return {
            "layer_rows": torch.tensor([self.work.layer_rows[layer] for layer in layers]),
            "filled_positions": torch.tensor([self.work.filled_positions[layer] for layer in layers]),
            "head_rows": torch.tensor([self.work.head_rows[layer] for layer in (0, *layers)]),
            "candidate_rows": torch.tensor([self.work.candidate_rows[layer] for layer in (0, *layers)]),
        }


class RecordingStoppingCriteria(StoppingCriteriaList):
    """Stopping criteria that tell a run, at each step, which rows they end."""

    def __init__(self, criteria: StoppingCriteriaList, run: ExitRun):
        super().__init__(criteria)
        self.run = run

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        finished = super().__call__(input_ids, scores, **kwargs)
        self.run.record_finished(to_host(finished))
        return finished
