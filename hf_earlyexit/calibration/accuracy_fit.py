"""Fits exit accuracies on a model's own full-depth texts: one teacher-forced pass evaluates every exit on every token.

The fit itself, on confidences and agreement, is `exits/accuracy_thresholds.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_earlyexit.common.data import Example, short_hash
from hf_earlyexit.common.partition import OPEN, Partition
from hf_earlyexit.common.seen_inputs import CRITERIA as FITTED
from hf_earlyexit.decoding.candidates import full_depth
from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.evaluation.forced import force
from hf_earlyexit.evaluation.generate_texts import TextGenerator
from hf_earlyexit.exits.accuracy_thresholds import LEAST_TOKENS, LEVELS, WRAPPED, ExitAccuracy, fit_accuracy
from hf_earlyexit.exits.criteria import CRITERIA
from hf_earlyexit.generation.refusals import refuse_training_mode


def fit_exit_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    criterion: str = "softmax",
    *,
    exit_layers: Sequence[int] | None = None,
    generation: Mapping[str, Any] | None = None,
    max_source_tokens: int | None = None,
    batch_size: int = 8,
    least_tokens: int = LEAST_TOKENS,
    levels: int | None = LEVELS,
    parts: Sequence[str] = OPEN,
    partition: Partition | None = None,
) -> ExitAccuracy:
    """Fit the tables of an `ExitAccuracy`.

    The model generates at full depth for all inputs. Its texts then pass through the decoder once more, whole and
    without a cache, and every exit is evaluated on every token. Keys and values are therefore those of full depth, not
    projected from kept hidden states as they are after an exit.

    Args:
        model: In eval mode. The inputs that are read are recorded with it (`record_seen`).
        tokenizer: Of the model.
        examples: The inputs; references are not used. Inputs of parts other than `parts` are not read.
        criterion: The criterion whose confidence the tables are for; a name in `CRITERIA` other than `"fixed"`.
        exit_layers: The exit points that will be evaluated; all of the model's if None.
        generation: Keywords of `generate`, such as `max_new_tokens`.
        max_source_tokens: Longer inputs are truncated; None: never.
        batch_size: Inputs per batch.
        least_tokens, levels: As for `fit_accuracy`.
        parts: The parts of the partition whose inputs are read. No certificate of the criterion can be tested on them.
        partition: The default one if None.

    Raises:
        ValueError: The criterion is not one of those above, an exit layer is not an exit point of the model, there is
            no input, there are too few tokens, or the model is in training mode.
    """
    if criterion not in WRAPPED:
        raise ValueError(f"`criterion` must be one of {list(WRAPPED)}, got {criterion!r}.")
    refuse_training_mode(model)
    if not examples:
        raise ValueError("`examples` must have at least one input, got none.")
    asked = {"exit_criterion": criterion, "exit_threshold": 1.0, "exit_layers": exit_layers}
    settings = ExitSettings.merge(asked, None, None)
    num_layers = model.config.num_decoder_layers
    settings.check_against(model.early_exit, num_layers)
    options = {"generation": dict(generation or {}), "max_source_tokens": max_source_tokens}
    writer = TextGenerator(model, tokenizer, batch_size=batch_size, **options)
    read = (partition or Partition()).keep(examples, parts)
    model.record_seen(FITTED, (one.source for one in read))
    texts = writer.write(read, full_depth(), "accuracy").texts
    layers = sorted(settings.exit_points(model.early_exit, num_layers))
    forced = force(writer, read, texts, {criterion: CRITERIA[criterion]()}, layers)
    sure, right = (
        {layer: values.double().numpy()[:, column] for column, layer in enumerate(forced.layers)}
        for values in (forced.confidences[criterion], forced.agrees)
    )
    fitted = fit_accuracy(criterion, sure, right, least_tokens=least_tokens, levels=levels)
    return replace(fitted, fitted_on=tuple(sorted(map(short_hash, read))))
