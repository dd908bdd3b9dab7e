"""State of one `generate` call: live rows, exit decisions, per-token records and work counts.

The state is passed along with the call and never stored on a module, so several threads can generate with one model.
Independent of models and caches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import StoppingCriteriaList

from hf_earlyexit.common.transfer import to_host
from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.exits.criteria import BATCH_RULES, ExitPoint, Shortlist
from hf_earlyexit.exits.patience import Streaks
from hf_earlyexit.kernels.rows import Rows


class Work:
    """Executed work by layer (counted from 1), counted where it runs.

    Attributes:
        layer_rows: Rows x positions that entered each block.
        filled_positions: Positions whose keys and values were projected from a kept or exiting hidden state.
        head_rows: Rows for which the whole vocabulary head was evaluated after each layer.
        candidate_rows: Additional rows of the head's weight that were evaluated: rows of the batch x their candidates.
    """

    def __init__(self):
        self.layer_rows: Counter[int] = Counter()
        self.filled_positions: Counter[int] = Counter()
        self.head_rows: Counter[int] = Counter()
        self.candidate_rows: Counter[int] = Counter()


@dataclass
class StepRecord:
    """One decoding step: layers run (0 if none) and exit confidence (NaN if none) of every row."""

    layers: list[int]
    confidences: list[float]


class ExitRun:
    """One `generate` call.

    Args:
        settings: Settings of the call.
        exit_points: Layers after which exits are evaluated.
        num_layers: Number of decoder layers.
        batch_size: Number of rows, including beams and returned sequences.
        max_length: Maximum number of decoder ids, prompt and new tokens.
        device: Device of the model.

    Attributes:
        shortlist: The candidate tokens of the rows in this step.
        streaks: The rows' last first choices in this step, and for how many exit points in a row they held.
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
        """Start the record of a new token; returns the live rows.

        Args:
            length: Number of decoder ids passed in; in the first step, the prompt's length.
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
        """The live rows of the current step."""
        return self._live

    def exiting(self, point: ExitPoint) -> list[int]:
        """Indices, within the rows of `point`, of the rows that exit here.

        Reads the device once, and once more if rows that pass the threshold were evaluated on candidates.
        """
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
        """Record that `row` ran `layer` layers for the token of this step."""
        step = self.steps[-1]
        step.layers[row], step.confidences[row] = layer, confidence

    def record_finished(self, finished: Sequence[bool]) -> None:
        """Mark rows that the stopping criteria have finished, one flag per row; they are skipped from now on."""
        self._finished = [before or now for before, now in zip(self._finished, finished, strict=True)]

    def see_logits(self, logits: torch.Tensor) -> None:
        """Receive the step's final logits `[batch, 1, vocabulary]`; ignored here, used by `RecordedRun`."""

    # --- the result -------------------------------------------------------------------------------------------------

    def layers_run(self) -> torch.Tensor:
        """Layers run per token: `[batch, steps]`, integers."""
        return torch.tensor([step.layers for step in self.steps], dtype=torch.long).reshape(-1, self.batch_size).T

    def exit_confidences(self) -> torch.Tensor:
        """Confidences at the exits: `[batch, steps]`, fp32; NaN where the row did not exit early."""
        return torch.tensor([step.confidences for step in self.steps]).reshape(-1, self.batch_size).T

    def per_token(self) -> dict[str, torch.Tensor]:
        """Per-token results, `[batch, steps, ...]` by name."""
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
    """Stopping criteria that report to a run, at each step, which rows have finished."""

    def __init__(self, criteria: StoppingCriteriaList, run: ExitRun):
        super().__init__(criteria)
        self.run = run

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        finished = super().__call__(input_ids, scores, **kwargs)
        self.run.record_finished(to_host(finished))
        return finished
