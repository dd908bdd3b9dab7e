"""The shipped checkpoint on real inputs: laws 1 to 4, 7 and 8, and the statements of its card."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from hf_earlyexit.families.shipped import (
    CHECKPOINT,
    PREFIX,
    default_examples,
    default_exits,
    default_inputs,
    load_default,
)
from tests import laws, tiny
from tests.watching import Recording, Scripted, pseudo_random_script


INPUTS = (Path(__file__).parent.parent / "data/e2e_validation_inputs.txt").read_text(encoding="utf-8").splitlines()
THRESHOLDS = {"softmax": (0.5, 0.8, 0.95), "state": (0.96, 0.97, 0.98)}


@lru_cache
def shipped():
    stock = T5ForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    return stock, *load_default()


def batches(texts: list[str], size: int = 16):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    for start in range(0, len(texts), size):
        yield dict(tokenizer(texts[start : start + size], return_tensors="pt", padding=True))


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, max_new_tokens=32, return_dict_in_generate=True, output_scores=True, **kwargs)


def differences(output, expected) -> list[laws.Tie]:
    """The first differences between the rows of `output` and those of a stock output."""
    rows = [SimpleNamespace(sequences=expected.sequences[row : row + 1]) for row in range(len(expected.sequences))]
    return [tie for row, one in enumerate(rows) if (tie := laws.first_difference(output, one, row, None, 0.0))]


def alone(stock, inputs, row: int, **kwargs):
    return generate(stock, laws.one_row(inputs, row), **kwargs)


@pytest.mark.parametrize("count", (16, pytest.param(200, marks=pytest.mark.slow)))
def test_never_equals_stock(count):
    """Law 1 with the tie rule. Both models run batches of 16, so they round alike and ties are rare."""
    assert len(set(INPUTS)) == 200
    stock, model, _ = shipped()
    ties = []
    for inputs in batches(INPUTS[:count]):
        output = generate(model, inputs)
        expected = generate(stock, inputs)
        ties += differences(output, expected)
    print("ties:", ties)
    assert len(ties) <= 0.005 * count and all(tie.margin <= laws.TOLERANCE for tie in ties)


@pytest.mark.parametrize("criterion", THRESHOLDS)
@pytest.mark.parametrize("count", (4, pytest.param(200, marks=pytest.mark.slow)))
def test_batch_equals_rows_alone(criterion, count):
    """Law 3 with the tie rule, at three thresholds; the ties are printed."""
    _, model, _ = shipped()
    for threshold in THRESHOLDS[criterion]:
        ties, depths = [], set()
        for inputs in batches(INPUTS[:count]):
            recording = Recording(laws.CRITERIA[criterion])
            batch = generate(model, inputs, exit_criterion=recording, exit_threshold=threshold)
            kwargs = {"exit_criterion": criterion, "exit_threshold": threshold}
            rows = range(len(batch.sequences))
            found = (
                laws.first_difference(batch, alone(model, inputs, row, **kwargs), row, recording, threshold)
                for row in rows
            )
            ties += [tie for tie in found if tie]
            depths |= set(batch.layers_run.unique().tolist())
        print(f"{criterion} {threshold}: {count} rows, layers {sorted(depths - {0})}, ties: {ties}")
        assert len(ties) <= 0.005 * count and all(tie.margin <= laws.TOLERANCE for tie in ties)
        assert len(depths - {0}) >= 3


@pytest.mark.parametrize("count", (8, pytest.param(32, marks=pytest.mark.slow)))
def test_fixed_exit_equals_cut_stock(count):
    """Law 2 on a trained model, with the tie rule; an exit has its own norm."""
    stock, model, _ = shipped()
    ties = []
    for inputs in batches(INPUTS[:count]):
        for layer in (1, 3, 6, 8):
            output = generate(model, inputs, exit_criterion="fixed", exit_layer=layer)
            cut = tiny.cut_to(stock, layer)
            cut.decoder.final_layer_norm = model.exit_heads.head_of(layer, stock.decoder.final_layer_norm)
            expected = generate(cut, inputs)
            ties += differences(output, expected)
            assert set(output.layers_run.unique().tolist()) <= {0, layer}
    assert ties == []


def test_work_reported_is_work_executed_and_survives_saving(tmp_path):
    """Laws 7 and 8 on a trained model."""
    _, model, _ = shipped()
    inputs = next(batches(INPUTS[:7]))
    call = {"exit_criterion": "softmax", "exit_threshold": 0.9, "max_new_tokens": 48, "logits_processor": None}
    output = laws.work_is_what_ran(model, inputs, ends=[1], **call)
    laws.assert_not_vacuous(output)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    other = laws.generate(again, inputs, ends=[1], **call)
    assert torch.equal(output.sequences, other.sequences) and torch.equal(output.layers_run, other.layers_run)


def test_lazy_and_eager_follow_frozen_rows():
    """Law 4 on a trained model, in fp64, under a script."""
    stock, model, _ = shipped()
    try:
        script = pseudo_random_script(1, 8)
        inputs = next(batches(INPUTS[:7]))
        stock, model = stock.double(), model.double()
        norm_of = lambda layer: model.exit_heads.head_of(layer, stock.decoder.final_layer_norm)  # noqa: E731
        expected, logits = laws.frozen_row_generate(stock, inputs, script, 24, None, (1,), norm_of)
        for fill in ("lazy", "eager"):
            output = model.generate(
                **inputs,
                max_new_tokens=24,
                return_dict_in_generate=True,
                output_logits=True,
                exit_criterion=Scripted(script),
                exit_threshold=0.5,
                fill=fill,
            )
            assert torch.equal(output.sequences, expected)
            torch.testing.assert_close(output.logits[5], logits[:, 5].float())
    finally:
        shipped.cache_clear()


def test_the_exits_that_ship_are_the_models():
    """The distribution matches the data per token, and is close to that of the setting on other inputs."""
    _, model, _ = shipped()
    exits = default_exits()
    depths = [depth for row in exits["layers_run"] for depth in row]
    shares = [depths.count(layer) / len(depths) for layer in range(1, 9)]
    assert exits["distribution"] == pytest.approx(shares) and len(exits["layers_run"]) == 274
    found = [generate(model, inputs, **exits["setting"]).layers_run for inputs in batches(INPUTS[:48])]
    layers = torch.cat([one[one > 0] for one in found]).float()
    assert layers.mean() == pytest.approx(sum(depths) / len(depths), abs=0.4)
    assert set(layers.unique().tolist()) == {layer for layer, share in enumerate(shares, 1) if share}


def test_the_shipped_model_is_what_its_card_says():
    _, model, tokenizer = shipped()
    parameters = list(model.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.float32} and not model.training
    assert 16.0e6 < sum(parameter.numel() for parameter in parameters) < 16.4e6
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 40e6
    assert len(default_inputs()) == 8 and not set(default_inputs()) & set(INPUTS)
    inputs = tokenizer(
        [INPUTS[0], "describe: name[Blue Spice], eatType[coffee shop]"], return_tensors="pt", padding=True
    )
    text = tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=48), skip_special_tokens=True)[1]
    assert "Blue Spice" in text and "coffee shop" in text


def test_the_inputs_that_ship_have_all_their_references():
    examples = default_examples()
    sources = [one.source for one in examples]
    assert len(set(sources)) == len(sources) == 547 and sum(len(one.references) for one in examples) == 4672
    assert all(one.references and one.unit == one.source and one.source.startswith(PREFIX) for one in examples)
    assert {*default_inputs(), *INPUTS} <= set(sources)
    first = examples[0]
    assert "name[Alimentum]" in first.source and len(first.references) == 6
    assert all("Alimentum" in reference for reference in first.references)
