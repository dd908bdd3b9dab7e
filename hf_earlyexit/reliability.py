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
Bins = list[dict[str, float]]


class ConfidencesOf:
    """As an `exit_objective`: what criteria say of every labelled token at every exit point, and who is right.

    Args:
        criteria: Their names.
    """

    def __init__(self, criteria: Sequence[str]):
        self.criteria = {name: CRITERIA[name]() for name in criteria}

    def __call__(self, exits: LabelledExits) -> dict[int, dict[str, torch.Tensor]]:
        """By layer: `[N]` confidences by criterion, and as `"agrees"` whether it says what the last layer does."""
        streaks = Streaks()  # all exit points of the model are asked, in order
        return {layer: self._at(exits, layer, streaks) for layer in exits.layers}

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
        said = {name: criterion.confidence(point).float() for name, criterion in self.criteria.items()}
        return {**said, "agrees": point.logits.argmax(dim=-1) == exits.full_depth_choices}


@torch.no_grad()
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
    ask, found, start = ConfidencesOf(criteria), [], 0
    for batch in tqdm(writer.batches(examples), desc="reliability", unit="batch", leave=False):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        texts = full_depth[start : start + len(inputs["input_ids"])]
        start += len(texts)
        labels = _labels([text.tokens for text in texts]).to(writer.model.device)
        found.append(writer.model(**inputs, labels=labels, exit_objective=ask).loss)
    layers = found[0] if found else {}
    return {
        name: {str(layer): _bins(_joined(found, layer, name), _joined(found, layer, "agrees")) for layer in layers}
        for name in criteria
    }


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
