"""Adapters: initially without effect; only they and exit heads are trained; merged, the model is plain again."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from transformers import CompileConfig, TrainerCallback

from hf_earlyexit import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.generation.fingerprint import parameter_versions
from tests import laws
from tests.tiny import tiny_inputs, tiny_pair
from tests.training.trainers import (
    EXITS,
    assert_same_weights,
    collate,
    losses,
    make_trainer,
    moved,
    rows,
    state_of,
    tiny,
)


pytest.importorskip("peft")
from hf_earlyexit.training.lora import add_lora, merge_lora


SOFTMAX = {"exit_criterion": "softmax", "exit_threshold": 0.05}
MAPS = 6 * (4 + 2) + 6 * (8 + 2)  # 6 encoder and 6 decoder layers; 4 maps per attention, 2 per feed-forward


def adapted(model_dropout: float = 0.0, seed: int = 0, **options):
    """A tiny model with the same adapters in each call."""
    model = tiny(model_dropout, seed=seed)
    torch.manual_seed(1)
    return add_lora(model, 4, **options)


@torch.no_grad()
def shaken(model):
    """Set random adapter weights, large enough to change outputs."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def exact(family: str = "untied"):
    return tiny_pair(family, 3, early_exit=EXITS)[1]


# --- at the start ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ("tied", "untied"))
def test_at_the_start_it_is_the_model(family):
    """Outputs are bit-identical, apart from the attention kernel that torch chooses if the position bias is frozen."""
    plain = exact(family)
    model = add_lora(copy.deepcopy(plain), 3)
    assert type(model) is EarlyExitT5ForConditionalGeneration
    ids = tiny_inputs(4)["input_ids"]
    assert torch.equal(model(input_ids=ids, labels=ids).logits, plain(input_ids=ids, labels=ids).logits)
    ours, theirs = (laws.generate(one, tiny_inputs(4), **SOFTMAX) for one in (model, plain))
    assert torch.equal(ours.sequences, theirs.sequences) and torch.equal(ours.layers_run, theirs.layers_run)


def test_who_may_move():
    model = tiny()
    model.exit_heads.heads["1"].norm.weight.requires_grad_(False)
    add_lora(model, 2)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = {name for name in names if ".lora_A." in name or ".lora_B." in name}
    assert len(adapters) == 2 * MAPS and all(
        name.startswith(("encoder.block.", "decoder.block.")) for name in adapters
    )
    heads = {f"exit_heads.{name}" for name, _ in model.exit_heads.named_parameters()}
    assert names - adapters == heads - {"exit_heads.heads.1.norm.weight"}


@pytest.mark.parametrize("family", ("tied", "untied"))
def test_targets(family):
    model = add_lora(exact(family), 2, targets=("q", "wo"))
    found = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name}
    assert found == {"q", "wo"}


def test_the_scale_is_alpha_over_rank():
    for alpha, scale in ((None, 2), (3, 0.75)):
        model = shaken(add_lora(exact(), 4, alpha))
        layer = model.decoder.block[1].layer[0].SelfAttention.q
        inputs = torch.randn(5, 32, dtype=torch.float64)
        low_rank = inputs @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
        torch.testing.assert_close(layer(inputs), inputs @ layer.base_layer.weight.T + scale * low_rank)


# --- in training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ("linear", "classifiers"))
def test_only_adapters_and_exit_heads_move_and_the_loss_falls(objective, tmp_path):
    model = adapted(0.1)
    before = state_of(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trainer = make_trainer(model, tmp_path, objective, max_steps=30)
    trainer.train()
    falling = losses(trainer)
    assert sum(falling[-5:]) < 0.9 * sum(falling[:5])
    lora = {name for name in before if "lora_" in name}
    heads = {name for name in before if name.startswith("exit_heads.heads.")}
    classifiers = {name for name in before if name.startswith("exit_heads.classifiers.")}
    assert moved(before, model) == (lora | heads if objective == "linear" else classifiers)
    assert len(lora) == 2 * MAPS and heads and classifiers
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_dropout_of_adapters_is_for_training(tmp_path):
    model = shaken(adapted(dropout=0.5))
    assert not any(module.training for module in model.modules()), "as it was before"
    batch = collate(rows(4))
    first, second = (model.train()(**batch).loss for _ in range(2))
    assert first != second
    first, second = (model.eval()(**batch).loss for _ in range(2))
    assert first == second


def test_accumulated_batches_are_one_batch(tmp_path):
    """Uses SGD, because Adam amplifies rounding errors."""
    whole, parts = adapted(), adapted()
    options = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1}
    one = make_trainer(whole, tmp_path / "one", **options)
    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    four = make_trainer(parts, tmp_path / "four", **options, **accumulated)
    before = state_of(whole)
    one.train()
    four.train()
    assert losses(one) == pytest.approx(losses(four), rel=1e-5)
    assert_same_weights(whole, parts)
    assert any("lora_B" in name for name in moved(before, whole))


def test_resumed_is_as_if_never_stopped(tmp_path):
    straight, stopped = adapted(0.1), adapted(0.1)
    whole = make_trainer(straight, tmp_path / "straight", max_steps=7)
    whole.train()
    half = make_trainer(stopped, tmp_path / "stopped", max_steps=7, save_strategy="steps", save_steps=4)

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    half.add_callback(Stop())
    half.train()
    again = make_trainer(adapted(0.1, seed=1), tmp_path / "stopped", max_steps=7)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == pytest.approx(losses(whole), rel=1e-5)
    assert_same_weights(again.model, straight)
    assert_same_weights(merge_lora(again.model), merge_lora(straight))


# --- merged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ("tied", "untied"))
def test_merged_says_the_same(family):
    """In fp64, logits, tokens and exits are equal, and the maps are W + alpha / rank B A."""
    plain = exact(family)
    model = shaken(add_lora(copy.deepcopy(plain), 4))
    ids = tiny_inputs(4)["input_ids"]
    logits = model(input_ids=ids, labels=ids).logits
    output = laws.generate(model, tiny_inputs(4), **SOFTMAX)
    assert not torch.allclose(logits, plain(input_ids=ids, labels=ids).logits, atol=0.1)
    layer = model.encoder.block[2].layer[0].SelfAttention.k
    expected = layer.base_layer.weight + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert merge_lora(model) is model
    torch.testing.assert_close(model.encoder.block[2].layer[0].SelfAttention.k.weight, expected)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).logits, logits)
    merged = laws.generate(model, tiny_inputs(4), **SOFTMAX)
    assert torch.equal(merged.sequences, output.sequences) and torch.equal(merged.layers_run, output.layers_run)
    assert len(set(output.layers_run.flatten().tolist()) - {0}) >= 2


def test_merged_it_is_as_it_was_but_for_the_weights(tmp_path):
    """Names, classes, attributes, flags and mode are restored, and the saved checkpoint is an ordinary one."""
    model = tiny()
    model.encoder.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modules = {name: (type(module), module.training) for name, module in model.named_modules()}
    names, attributes, marks = list(model.state_dict()), set(vars(model)), parameter_versions(model)
    merge_lora(shaken(add_lora(model, 2)))
    assert list(model.state_dict()) == names and set(vars(model)) == attributes
    assert modules == {name: (type(module), module.training) for name, module in model.named_modules()}
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert parameter_versions(model) != marks
    model.save_pretrained(tmp_path)
    again, info = EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_weights(again, model)
    merge_lora(add_lora(model, 3))  # a second time


@pytest.mark.parametrize("family", ("tied", "untied"))
def test_prepared_after_merging(family):
    """Preparing with adapters is refused, and a prepared copy from before `add_lora` is not used."""
    model = exact(family).prepare_for_generation()
    add_lora(model, 4)
    assert not model.is_prepared
    shaken(model)
    expected = laws.generate(model, tiny_inputs(4), **SOFTMAX)
    with pytest.raises(ValueError, match="merge adapters"):
        model.prepare_for_generation()
    assert merge_lora(model).prepare_for_generation().is_prepared
    output = laws.generate(model, tiny_inputs(4), **SOFTMAX)
    assert torch.equal(output.sequences, expected.sequences) and torch.equal(output.layers_run, expected.layers_run)


def test_compiled_after_merging():
    """A single row with one layer between exit points, on the backend without code generation."""
    model = shaken(add_lora(exact("tied"), 4))
    expected = laws.generate(model, tiny_inputs(1), **SOFTMAX)
    compiled = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager")}
    output = laws.generate(merge_lora(model), tiny_inputs(1), **SOFTMAX, **compiled)
    assert torch.equal(output.sequences, expected.sequences)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`rank` must be a whole number from 1 on, got 0"),
        ({"rank": 2.0}, "`rank`.*got 2.0"),
        ({"rank": True}, "`rank`.*got True"),
        ({"alpha": 0}, "`alpha` must be a number above 0.*got 0"),
        ({"alpha": float("inf")}, "`alpha`.*got inf"),
        ({"dropout": 1.0}, r"`dropout` must be a number in \[0, 1\), got 1.0"),
        ({"targets": ["q", "query"]}, r"`targets`.*\['k', 'o', 'q', 'v', 'wi', 'wo'\].*'query'"),
        ({"targets": []}, r"`targets`.*got \[\]"),
        ({"targets": "q"}, "`targets`.*got 'q'"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_is(options, message):
    model = tiny()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_lora(model, **({"rank": 2} | options))
    assert list(model.state_dict()) == names and all(parameter.requires_grad for parameter in model.parameters())


def test_twice_and_nothing_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_lora(model)
    add_lora(model, 2)
    with pytest.raises(ValueError, match="adapters already: call `merge_lora"):
        add_lora(model, 2)
    merge_lora(model)
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_lora(model)


@torch.no_grad()
def test_adapters_that_are_not_finite_are_not_merged():
    model = adapted()
    model.decoder.block[5].layer[2].DenseReluDense.wo.lora_A["default"].weight[0, 0] = float("nan")
    before = state_of(model)
    with pytest.raises(ValueError, match="`decoder.block.5.layer.2.DenseReluDense.wo` is not finite"):
        merge_lora(model)
    assert list(before) == list(model.state_dict())
    untouched = {name for name in before if "block.5.layer.2.DenseReluDense.wo.lora_A" not in name}
    assert not moved(before, model) & untouched


def test_quantised_weights_are_refused():
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny()
    is_query = lambda module, name: name.endswith("SelfAttention.q")  # noqa: E731
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=is_query)
    with pytest.raises(ValueError, match="SelfAttention.q` is a `Linear` with weights of type.*unquantised"):
        add_lora(model, 2)
    assert "lora_A" not in str(list(model.state_dict()))


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install hf-earlyexit\[lora\]"):
        add_lora(tiny(), 2)
