"""Evaluation of generated texts with the library's `Seq2SeqTrainer`, each against its own references."""

from __future__ import annotations

import copy

from torch.utils.data import Sampler, SequentialSampler
from transformers import Seq2SeqTrainer


class TextTrainer(Seq2SeqTrainer):
    """A `Seq2SeqTrainer` that evaluates rows in order and leaves the model's `generation_config` as it was."""

    def _get_eval_sampler(self, eval_dataset) -> Sampler | None:
        """In order: the library's follows `train_sampling_strategy`, which would separate texts from references."""
        return SequentialSampler(eval_dataset)

    def prediction_step(self, *args, **kwargs):
        """As the library's, but restores the model's `generation_config`, which the library fills with defaults."""
        kept = copy.deepcopy(self.model.generation_config)
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self.model.generation_config = kept
