"""Texts token by token: the exit layer and confidence of each token, and where full depth would choose another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import T5ForConditionalGeneration

from hf_earlyexit.common.data import Example
from hf_earlyexit.evaluation.generate_texts import Text, TextGenerator


@torch.no_grad()
def full_depth_choices(stock: T5ForConditionalGeneration, batch: Mapping[str, Any], sequences: torch.Tensor):
    """`[batch, T]`, the token that `stock` would write after each prefix of `sequences [batch, 1 + T]`."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return stock(**inputs, decoder_input_ids=sequences[:, :-1], use_cache=False).logits.argmax(dim=-1)


def heat_map(
    writer: TextGenerator,
    stock: T5ForConditionalGeneration,
    examples: Sequence[Example],
    full_depth: Sequence[Text],
    name: str,
    keywords: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The texts of a setting for a few inputs, as plain values.

    Args:
        writer: Of the model.
        stock: The stock model with the same weights.
        examples: The inputs, one batch.
        full_depth: The full-depth texts of these inputs.
        name: Of the setting.
        keywords: The setting's keywords of `generate`.

    Returns:
        For each input `name`, `input`, `references`, `full_text`, and for each token `tokens`, `layers`, `confidences`
        (None where all layers ran); `differs`, the places of tokens for which full depth would choose another token.
    """
    (batch,) = writer.batches(examples, len(examples))
    output = writer.model.generate(**batch, **keywords, return_dict_in_generate=True)
    others = output.sequences[:, 1:] != full_depth_choices(stock, batch, output.sequences)
    return [
        {
            "name": name,
            "input": example.source,
            "references": list(example.references),
            "full_text": full.text,
            **_tokens(writer.tokenizer, output, row, others[row].tolist()),
        }
        for row, (example, full) in enumerate(zip(examples, full_depth, strict=True))
    ]


def _tokens(tokenizer, output, row: int, differs: Sequence[bool]) -> dict[str, Any]:
    """A row up to its end, without special tokens."""
    places = [
        place
        for place, (token, layer) in enumerate(
            zip(output.sequences[row, 1:].tolist(), output.layers_run[row].tolist(), strict=True)
        )
        if layer and token not in tokenizer.all_special_ids
    ]
    confidences = output.exit_confidences[row, places].tolist()
    return {
        "tokens": tokenizer.convert_ids_to_tokens(output.sequences[row, 1:][places].tolist()),
        "layers": output.layers_run[row, places].tolist(),
        "confidences": [None if math.isnan(one) else one for one in confidences],
        "differs": [number for number, place in enumerate(places) if differs[place]],
    }
