"""The laws in low precision, bf16 and int8 weights by torchao: texts may change, exits and backfill may not."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TorchAoConfig

from hf_earlyexit import ClassifierConfig, EarlyExitConfig, EarlyExitT5ForConditionalGeneration
from hf_earlyexit.exits.heads import Classifier
from tests import laws
from tests.tiny import NUM_LAYERS, tiny_inputs, tiny_pair
from tests.watching import pseudo_random_script


HEADS = EarlyExitConfig([2, 4], heads="linear", classifier=ClassifierConfig(trained=True))


def quantised(model):
    """Quantise all linear maps except the LM head and exit heads, as `from_pretrained` does."""
    torchao = pytest.importorskip("torchao.quantization")
    is_inner = lambda module, name: isinstance(module, torch.nn.Linear) and "head" not in name  # noqa: E731
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=is_inner)
    return model


def int8_pair(seed: int):
    stock, model = tiny_pair("untied", seed, torch.float32)
    return quantised(copy.deepcopy(stock)), quantised(model)


def bf16_pair(seed: int):
    return tiny_pair("untied", seed, torch.bfloat16)


PAIRS = {"int8": int8_pair, "bf16": bf16_pair}


@pytest.mark.parametrize("kind", PAIRS)
def test_never_is_stock(kind):
    for seed in (0, 1):
        stock, model = PAIRS[kind](seed)
        inputs = tiny_inputs(4, seed)
        expected = laws.stock_generate(stock, inputs, seed)
        assert torch.equal(laws.generate(model, inputs, seed).sequences, expected.sequences)


@pytest.mark.parametrize("kind", PAIRS)
def test_fixed_exits_are_the_cut_stock_model(kind):
    for layer in (1, 3):
        laws.fixed_exit_equals_cut_stock(*PAIRS[kind](1), tiny_inputs(4, 1), layer, 1)


def test_int8_scripts_follow_frozen_rows():
    for seed in (0, 1):
        stock, model = int8_pair(seed)
        script = pseudo_random_script(seed, NUM_LAYERS)
        for output in laws.follows_frozen_rows(stock, model, tiny_inputs(4, seed), script, seed):
            laws.assert_not_vacuous(output)
            assert laws.longest_debt(output.layers_run, NUM_LAYERS) >= 2


@pytest.mark.parametrize("kind", PAIRS)
def test_late_payment_is_payment_at_once(kind):
    _, model = PAIRS[kind](1)
    call = {"exit_criterion": "softmax", "exit_threshold": 0.08}
    lazy, eager = (laws.generate(model, tiny_inputs(4, 1), 1, fill=fill, **call) for fill in ("lazy", "eager"))
    assert torch.equal(lazy.sequences, eager.sequences) and torch.equal(lazy.layers_run, eager.layers_run)
    laws.assert_not_vacuous(lazy)


@pytest.mark.parametrize("chosen", [None, ["lm_head", "shared", "encoder"]])
def test_exit_heads_stay_as_they_are(chosen, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    _, model = tiny_pair("untied", 0, torch.float32, HEADS)
    model.save_pretrained(tmp_path)
    asked = TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=chosen)
    loaded = EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path, quantization_config=asked)
    assert asked.modules_to_not_convert == chosen, "the caller's object is left alone"
    assert type(loaded.decoder.block[0].layer[0].SelfAttention.q.weight.data) is not torch.Tensor
    assert type(loaded.lm_head.weight.data) is torch.Tensor
    is_plain = type(loaded.encoder.block[0].layer[0].SelfAttention.q.weight.data) is torch.Tensor
    assert is_plain == (chosen is not None)
    for name, parameter in loaded.exit_heads.named_parameters():
        assert type(parameter.data) is torch.Tensor, name
        assert torch.equal(parameter, model.exit_heads.get_parameter(name)), name
    for criterion in ("softmax", "classifier"):
        loaded.generate(**tiny_inputs(2), max_new_tokens=4, exit_criterion=criterion, exit_threshold=0.5)
    with pytest.raises(ValueError, match="with weights of type `Int8Tensor`.*unquantised weights"):
        loaded.prepare_for_generation()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_classifiers_of_large_states_stay_in_fp32_under_autocast(dtype):
    """T5's raw states can exceed the range of fp16; training in mixed precision must not overflow."""
    classifier = Classifier(ClassifierConfig("mlp", width=4), 8)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.fill_(0.5)
    hidden = torch.full((3, 8), 1e5)
    expected = classifier(hidden)
    with torch.autocast("cpu", dtype=dtype):
        found = classifier(hidden)
    assert found.dtype == torch.float32 and torch.equal(found, expected) and expected.isfinite().all()
