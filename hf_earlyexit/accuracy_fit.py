"""Answers for accuracies of exits from a model and inputs: what full depth writes is read again, asking at every exit.

What becomes of confidences and agreement is `accuracy_thresholds.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_earlyexit.accuracy_thresholds import LEAST_TOKENS, LEVELS, WRAPPED, ExitAccuracy, fit_accuracy
from hf_earlyexit.candidates import full_depth
from hf_earlyexit.data import Example, short_hash
from hf_earlyexit.forced import force
from hf_earlyexit.partition import OPEN, Partition
from hf_earlyexit.policies import CRITERIA
from hf_earlyexit.refusals import refuse_training_mode
from hf_earlyexit.seen_inputs import CRITERIA as FITTED
from hf_earlyexit.settings import ExitSettings
from hf_earlyexit.writing import Writer


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

    Full depth writes for all inputs; its texts go through the decoder once more, whole, with no cache, and every exit
    is asked about every token. So keys and values are those of full depth, not projected from parked states as they
    are where tokens have left.

    Args:
        model: In eval mode. The inputs that are read are recorded with it (`record_seen`).
        tokenizer: Of the model.
        examples: The inputs; references are not looked at. Those of other parts than `parts` are not read.
        criterion: Which confidence the tables are of; a name in `CRITERIA` but `"fixed"`.
        exit_layers: The exit points that will be asked; all of the model if None.
        generation: Keywords of `generate`, such as `max_new_tokens`.
        max_source_tokens: Longer inputs are cut; None: never.
        batch_size: Inputs at once.
        least_tokens, levels: As for `fit_accuracy`.
        parts: Of the partition, which inputs are read. No certificate of the criterion can be tested on them.
        partition: The default one if None.

    Raises:
        ValueError: The criterion or an exit layer is none of the model's, there is no input, too few tokens, or the
            model is in training mode.
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
    writer = Writer(model, tokenizer, batch_size=batch_size, **options)
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
