"""Conversion of a checkpoint: stock T5 loads it, CTranslate2 converts that, and the tokens are the same."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import T5ForConditionalGeneration

from hf_earlyexit import ClassifierConfig, EarlyExitConfig
from hf_earlyexit.families.shipped import default_inputs, load_default
from tests import laws
from tests.tiny import tiny_inputs, tiny_pair


@torch.no_grad()
def model_with_heads():
    """The shipped model with heads other than the logit lens and exits by default, which conversion must drop."""
    torch.manual_seed(0)
    model, tokenizer = load_default(EarlyExitConfig(heads="linear", classifier=ClassifierConfig()))
    for parameter in model.exit_heads.parameters():
        parameter.add_(0.005 * torch.randn_like(parameter))
    model.generation_config.exit_criterion = "softmax"
    model.generation_config.exit_threshold = 0.5
    return model, tokenizer


def greedy(model, tokenizer, texts: list[str], **kwargs) -> list[list[str]]:
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    sequences = model.generate(**inputs, max_new_tokens=48, **kwargs)
    return [tokenizer.convert_ids_to_tokens(row, skip_special_tokens=True) for row in sequences.tolist()]


def ctranslate2_greedy(folder, tokenizer, texts: list[str]) -> list[list[str]]:
    import ctranslate2

    translator = ctranslate2.Translator(str(folder), compute_type="float32", inter_threads=1, intra_threads=1)
    source = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(texts).input_ids]
    return [one.hypotheses[0] for one in translator.translate_batch(source, beam_size=1, max_decoding_length=48)]


def test_saved_as_stock_it_is_a_plain_t5(tmp_path):
    """No part of the exits is left, and the full-depth tokens are the same, tied or not."""
    for family in ("tied", "untied"):
        stock, model = tiny_pair(family)
        model.generation_config.exit_criterion, model.generation_config.exit_threshold = "softmax", 0.5
        model.save_stock(tmp_path)
        config, settings = (json.loads((tmp_path / f"{name}config.json").read_text()) for name in ("", "generation_"))
        assert config["model_type"] == "t5" and config["architectures"] == ["T5ForConditionalGeneration"]
        assert not any("exit" in name for name in (*config, *settings))
        again, info = T5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        found, expected = (laws.stock_generate(one.eval(), tiny_inputs(4)) for one in (again, stock))
        assert torch.equal(found.sequences, expected.sequences)
        assert model.generation_config.exit_criterion == "softmax" and model.lm_head.weight.device.type == "cpu"


def test_ctranslate2_says_what_full_depth_says(tmp_path):
    """CTranslate2 selects a converter by the name of the configuration class, so the model is first saved as stock."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    model, tokenizer = model_with_heads()
    plain, converted = tmp_path / "plain", tmp_path / "converted"
    model.save_stock(plain)
    tokenizer.save_pretrained(plain)
    stock = T5ForConditionalGeneration.from_pretrained(plain)
    ctranslate2.converters.TransformersConverter(str(plain)).convert(str(converted))

    texts = default_inputs()
    expected = greedy(model, tokenizer, texts, early_exit=False)
    assert greedy(model, tokenizer, texts) != expected, "exits that change nothing would not be noticed"
    assert greedy(stock.eval(), tokenizer, texts) == expected
    assert ctranslate2_greedy(converted, tokenizer, texts) == expected
    assert all(len(row) > 5 for row in expected)
