"""Confidence against agreement matches values by hand, on full-depth texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_earlyexit import ClassifierConfig, EarlyExitConfig
from hf_earlyexit.common.data import Example
from hf_earlyexit.evaluation.forced import force
from hf_earlyexit.evaluation.generate_texts import Text
from hf_earlyexit.evaluation.reliability import bins, reliability
from hf_earlyexit.exits.criteria import CRITERIA
from tests.tiny import NUM_LAYERS, tiny_inputs, tiny_pair


class Numbers:
    """A stand-in for `TextGenerator` whose inputs are the rows of a tiny batch."""

    def __init__(self, model, size: int):
        self.model, self.size, self.inputs = model, size, tiny_inputs(4)

    def batches(self, examples):
        for start in range(0, len(examples), self.size):
            yield {name: tensor[start : start + self.size] for name, tensor in self.inputs.items()}


@pytest.fixture(scope="module")
def model():
    classifier = ClassifierConfig(kind="linear", trained=True)
    return tiny_pair(seed=2, early_exit=EarlyExitConfig(exit_layers=(1, 3, 5), classifier=classifier))[1]


def texts_of(model) -> list[Text]:
    """Full-depth texts of the four rows, of different lengths; one token is replaced, as a logits processor might."""
    ids = model.generate(**tiny_inputs(4), max_new_tokens=6, early_exit=False)[:, 1:].tolist()
    ids[3][0] = 5
    return [Text("", row[: 3 + place], []) for place, row in enumerate(ids)]


def by_hand(model, texts) -> tuple[dict, dict]:
    """Confidences of three criteria and agreement for each layer, row by row with stock calls."""
    confidences = {name: {1: [], 3: [], 5: []} for name in ("max_prob", "state", "classifier")}
    agrees: dict = {1: [], 3: [], 5: []}
    for row, text in enumerate(texts):
        inputs = {name: tensor[row : row + 1] for name, tensor in tiny_inputs(4).items()}
        prompt = torch.tensor([[0, *text.tokens[:-1]]])
        with torch.no_grad():
            output = model(**inputs, decoder_input_ids=prompt, output_hidden_states=True, use_cache=False)
            for layer in agrees:
                hidden, below = output.decoder_hidden_states[layer][0], output.decoder_hidden_states[layer - 1][0]
                logits = model.lm_head(model.exit_head_input(layer, hidden))
                agrees[layer] += (logits.argmax(-1) == output.logits[0].argmax(-1)).tolist()
                confidences["max_prob"][layer] += logits.softmax(-1).amax(-1).tolist()
                cosine = torch.cosine_similarity(hidden, below, dim=-1).clamp(0, 1) * (layer > 1)
                confidences["state"][layer] += cosine.tolist()
                confidences["classifier"][layer] += model.exit_heads.exit_logits(layer, hidden).sigmoid().tolist()
    return confidences, agrees


@pytest.mark.parametrize("size", [1, 3])
def test_it_is_what_stock_calls_give_by_hand(model, size):
    texts = texts_of(model)
    examples = [Example(f"{row}") for row in range(4)]
    criteria = {name: CRITERIA[name]() for name in ("max_prob", "state", "classifier")}
    found = reliability(force(Numbers(model, size), examples, texts, criteria))
    confidences, agrees = by_hand(model, texts)
    for name, layers in confidences.items():
        assert list(found[name]) == ["1", "3", "5"]
        for layer, values in layers.items():
            those = found[name][str(layer)]
            assert sum(one["count"] for one in those) == len(values) == 3 + 4 + 5 + 6
            expected = bins(np.array(values), np.array(agrees[layer], dtype=float))
            assert [one["count"] for one in those] == [one["count"] for one in expected]
            for one, other in zip(those, expected):
                assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-5)
                assert one["agreement"] == other["agreement"]
    assert 0 < np.mean(agrees[5]) < 1 and NUM_LAYERS == 6


def test_bins_by_hand():
    found = bins(np.array([0.0, 0.05, 0.95, 1.0, 0.55]), np.array([0, 1, 1, 1, 0]))
    assert [one["count"] for one in found] == [2, 1, 2]
    assert [one["confidence"] for one in found] == pytest.approx([0.025, 0.55, 0.975])
    assert [one["agreement"] for one in found] == [0.5, 0.0, 1.0]
