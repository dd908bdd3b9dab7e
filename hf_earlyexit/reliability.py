"""Answers for whether confidences mean what they say: of each exit, confidence against agreement with full depth.

Under teacher forcing on the texts of full depth: every layer runs for every token, so keys and values are those of
full depth, not projected from parked states as in a text with exits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from hf_earlyexit.data import Example
from hf_earlyexit.labelled import IGNORED, LabelledExits
from hf_earlyexit.patience import Streaks
from hf_earlyexit.policies import CRITERIA, ExitPoint
from hf_earlyexit.writing import Text, Writer


BINS = 10
AGREES = "agrees"
Bins = list[dict[str, float]]


class ConfidencesOf:
    """As an `exit_objective`: what criteria say of every labelled token at every exit point, and who is right.

    Args:
        criteria: Their names.
        exit_layers: The exit points that are asked; all of the model if None.
    """

    def __init__(self, criteria: Sequence[str], exit_layers: Sequence[int] | None = None):
        self.criteria = {name: CRITERIA[name]() for name in criteria}
        self.exit_layers = exit_layers

    def __call__(self, exits: LabelledExits) -> dict[int, dict[str, torch.Tensor]]:
        """By layer: `[N]` confidences by criterion, and as `"agrees"` whether it says what the last layer does."""
        layers, streaks = exits.layers if self.exit_layers is None else self.exit_layers, Streaks()
        return {layer: self._at(exits, layer, streaks) for layer in layers}

    def _at(self, exits: LabelledExits, layer: int, streaks: Streaks) -> dict[str, torch.Tensor]:
        count = len(exits.labels)
        score, classify = exits.logits, lambda layer: exits.exit_logits(layer).sigmoid()
        point = ExitPoint(
            layer,
            list(range(count)),
            [0] * count,
            exits.hidden(layer),
            exits.hidden(layer - 1),
            lambda layer, hidden: score(layer),
            lambda layer, hidden: classify(layer),
            streaks=streaks,
        )
        said = {name: criterion.confidence(point) for name, criterion in self.criteria.items()}
        return {**said, AGREES: point.logits.argmax(dim=-1) == exits.full_depth_choices}


def reliability(
    writer: Writer, examples: Sequence[Example], full_depth: Sequence[Text], criteria: Sequence[str]
) -> dict[str, dict[str, Bins]]:
    """Of each criterion and exit layer, confidences in tenths: their mean, the share that agrees, and how many.

    Args:
        writer: Of the model.
        examples: The inputs.
        full_depth: What full depth writes for them.
        criteria: Names; `"fixed"` has no confidence to speak of.
    """
    said = forced_confidences(writer, examples, full_depth, criteria)
    return {name: {str(layer): _bins(one[name], one[AGREES]) for layer, one in said.items()} for name in criteria}


@torch.no_grad()
def forced_confidences(
    writer: Writer,
    examples: Sequence[Example],
    full_depth: Sequence[Text],
    criteria: Sequence[str],
    exit_layers: Sequence[int] | None = None,
) -> dict[int, dict[str, NDArray]]:
    """By exit layer: `[tokens]` of all texts, in order, confidences by criterion, and as `"agrees"` whether the exit's
    first choice is the last layer's, 0 or 1.

    Args:
        writer, examples, full_depth, criteria: As for `reliability`.
        exit_layers: The exit points that are asked; all of the model if None.
    """
    ask, found, start = ConfidencesOf(criteria, exit_layers), [], 0
    for batch in tqdm(writer.batches(examples), desc="reliability", unit="batch", leave=False):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        texts = full_depth[start : start + len(inputs["input_ids"])]
        start += len(texts)
        labels = _labels([text.tokens for text in texts]).to(writer.model.device)
        found.append(writer.model(**inputs, labels=labels, exit_objective=ask).loss)
    layers = found[0] if found else {}
    return {layer: {name: _joined(found, layer, name) for name in (*criteria, AGREES)} for layer in layers}


def _labels(tokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """`[batch, longest]`, with no label where a text has ended."""
    longest = max(map(len, tokens))
    return torch.tensor([[*row, *[IGNORED] * (longest - len(row))] for row in tokens])


def _joined(found: Sequence[Mapping[int, Mapping[str, Any]]], layer: int, name: str) -> NDArray:
    return torch.cat([batch[layer][name] for batch in found]).cpu().double().numpy()


def _bins(confidences: NDArray, agrees: NDArray) -> Bins:
    """Tenths of [0, 1] with anything in them, ascending; 1 is in the last one."""
    place = np.minimum((confidences * BINS).astype(int), BINS - 1)
    return [
        {
            "confidence": float(confidences[place == one].mean()),
            "agreement": float(agrees[place == one].mean()),
            "count": int((place == one).sum()),
        }
        for one in range(BINS)
        if (place == one).any()
    ]
