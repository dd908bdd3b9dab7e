"""Answers for evaluating texts with the library's `Seq2SeqTrainer` so that they are judged by their own references."""

from __future__ import annotations

import copy

from torch.utils.data import Sampler, SequentialSampler
from transformers import Seq2SeqTrainer


class TextTrainer(Seq2SeqTrainer):
    """A `Seq2SeqTrainer` that evaluates rows in order and leaves the model's `generation_config` as it was."""

    def _get_eval_sampler(self, eval_dataset) -> Sampler | None:
        """In order: the library follows the training's `train_sampling_strategy`, and texts lose their references."""
        return SequentialSampler(eval_dataset)

    def prediction_step(self, *args, **kwargs):
        """As the library's, which fills the model's `generation_config` with defaults; here it stays as it was."""
        kept = copy.deepcopy(self.model.generation_config)
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self.model.generation_config = kept
