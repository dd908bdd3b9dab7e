"""Model classes: loading, saving, and plain T5 behaviour, in every dtype."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
)

from hf_earlyexit import ClassifierConfig, EarlyExitConfig, EarlyExitT5Config, EarlyExitT5ForConditionalGeneration
from tests import laws
from tests.tiny import FAMILIES, NUM_LAYERS, tiny_config, tiny_inputs, tiny_pair, tiny_stock
from tests.watching import Scripted, pseudo_random_script, threshold_for


MIXED = EarlyExitConfig(
    exit_layers=(1, 2, 3, 4, 5),
    heads=("shared", "norm", "shortcut", "linear", "mlp"),
    classifier=ClassifierConfig("mlp", shared=False),
)


def load(path, **kwargs):
    model, info = EarlyExitT5ForConditionalGeneration.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval(), sorted(info["missing_keys"])


def plain_logits(model, inputs) -> torch.Tensor:
    return model(**inputs, labels=torch.tensor([[5, 6, 7, 1]] * len(inputs["input_ids"]))).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_checkpoint_becomes_an_early_exit_model(family, tmp_path):
    stock = tiny_stock(family, 1, torch.float32)
    stock.save_pretrained(tmp_path)
    model, missing = load(tmp_path)
    assert missing == [] and isinstance(model.config, EarlyExitT5Config)
    assert model.config.model_type == "early_exit_t5"
    assert model.early_exit.exit_layers == tuple(range(1, NUM_LAYERS))
    assert model.config.scale_decoder_outputs == stock.config.scale_decoder_outputs == (family != "untied")
    inputs = tiny_inputs(3)
    assert torch.equal(plain_logits(model, inputs), plain_logits(stock, inputs))
    assert model(**inputs, labels=inputs["input_ids"]).loss == stock(**inputs, labels=inputs["input_ids"]).loss
    laws.never_equals_stock(stock, model, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_exit_heads_are_missing_and_they_start_as_the_logit_lens(family, tmp_path):
    stock = tiny_stock(family, 2, torch.float32)
    stock.save_pretrained(tmp_path)
    lens, _ = load(tmp_path)
    model, missing = load(tmp_path, early_exit=MIXED)
    assert missing and all(name.startswith("exit_heads.") for name in missing)
    assert model.early_exit == MIXED.for_layers(NUM_LAYERS)
    inputs = tiny_inputs(3)
    for layer in MIXED.exit_layers:
        call = {"exit_criterion": "fixed", "exit_layer": layer}
        ours, theirs = laws.generate(model, inputs, **call), laws.generate(lens, inputs, **call)
        assert torch.equal(ours.sequences, theirs.sequences)
        for mine, other in zip(ours.logits, theirs.logits):
            torch.testing.assert_close(mine, other)


@torch.no_grad()
def test_save_and_load_keeps_tokens_exits_and_settings(tmp_path):
    """Law 7, with heads other than the logit lens."""
    for family in FAMILIES:
        _, model = tiny_pair(family, 3, torch.float32, early_exit=MIXED)
        for parameter in model.exit_heads.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.generation_config.exit_criterion = "softmax"
        threshold = threshold_for(model, tiny_inputs(4, 3), laws.CRITERIA["softmax"], 0.7, max_new_tokens=16)
        model.generation_config.exit_threshold = threshold
        model.generation_config.exit_schedule = {"name": "calm", "tau": 2.0}
        model.generation_config.batch_exit = "row"
        folder = tmp_path / family
        model.save_pretrained(folder)
        assert {path.name for path in folder.iterdir()} == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
        }
        inputs = tiny_inputs(4, 3)
        expected = laws.generate(model, inputs)
        assert len(set(expected.layers_run.flatten().tolist())) >= 3
        for again in (load(folder)[0], AutoModelForSeq2SeqLM.from_pretrained(folder).eval()):
            assert type(again) is EarlyExitT5ForConditionalGeneration
            assert again.early_exit == model.early_exit
            output = laws.generate(again, inputs)
            assert torch.equal(output.sequences, expected.sequences)
            assert torch.equal(output.layers_run, expected.layers_run)
            again.save_pretrained(folder)
        assert json.loads((folder / "generation_config.json").read_text())["exit_threshold"] == threshold


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_loads_as_plain_t5(family, tmp_path):
    stock, model = tiny_pair(family, 4, torch.float32, early_exit=MIXED)
    model.save_pretrained(tmp_path)
    plain = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = tiny_inputs(3)
    assert torch.equal(plain_logits(plain, inputs), plain_logits(stock, inputs))


@torch.no_grad()
def test_heads_compute_what_they_say():
    for kind in ("norm", "linear", "mlp", "shortcut"):
        _, model = tiny_pair("tied", 5, early_exit=EarlyExitConfig(exit_layers=(2,), heads=kind))
        head, hidden = model.exit_heads.heads["2"], torch.randn(3, 32, dtype=torch.float64)
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter))
        mapped = hidden @ head.map.weight.T if kind == "shortcut" else hidden
        normed = head.norm.weight * mapped / (mapped.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        expected = normed
        if kind == "linear":
            expected = normed + normed @ head.map.weight.T
        if kind == "mlp":
            expected = normed + torch.relu(normed @ head.up.weight.T + head.up.bias) @ head.down.weight.T
        torch.testing.assert_close(head(hidden), expected, rtol=1e-6, atol=1e-6)


def test_missing_classifiers_are_untrained_whatever_is_said(tmp_path):
    tiny_stock("tied", 0, torch.float32).save_pretrained(tmp_path)
    model, _ = load(tmp_path, early_exit=EarlyExitConfig(classifier=ClassifierConfig(trained=True)))
    assert model.early_exit.classifier.trained is False
    model.config.early_exit["classifier"]["trained"] = True
    model.save_pretrained(tmp_path / "trained")
    assert load(tmp_path / "trained")[0].early_exit.classifier.trained is True


def test_library_style_arguments(tmp_path):
    _, model = tiny_pair("tied", 0, torch.float32)
    model.save_pretrained(tmp_path)
    config = EarlyExitConfig(exit_layers=(2, 3))
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path, early_exit=config).early_exit.exit_layers == (2, 3)
    assert load(tmp_path, config=str(tmp_path))[0].early_exit == model.early_exit
    own = EarlyExitT5Config.from_pretrained(tmp_path)
    assert load(tmp_path, config=own, early_exit=config)[0].early_exit.exit_layers == (2, 3)
    assert own.early_exit == model.config.early_exit, "the caller's configuration is left as it is"
    values = {name: value for name, value in own.to_dict().items() if name != "model_type"}
    assert EarlyExitT5ForConditionalGeneration(
        EarlyExitT5Config(**{**values, "early_exit": config})
    ).early_exit.exit_layers == (2, 3)
    for other in (tiny_config(), UMT5Config()):
        with pytest.raises(ValueError, match="`config` must be an `EarlyExitT5Config`"):
            EarlyExitT5ForConditionalGeneration(other)


def test_trained_heads_survive_new_ones_and_only_the_new_start_as_lens(tmp_path):
    config = EarlyExitConfig(exit_layers=(1, 2), heads="norm")
    _, model = tiny_pair("tied", 5, torch.float32, early_exit=config)
    torch.nn.init.constant_(model.exit_heads.heads["1"].norm.weight, 7.0)
    model.save_pretrained(tmp_path)
    again, missing = load(tmp_path, early_exit=EarlyExitConfig(exit_layers=(1, 2, 3), heads="norm"))
    assert missing == ["exit_heads.heads.3.norm.weight"]
    assert (again.exit_heads.heads["1"].norm.weight == 7).all()
    assert torch.equal(again.exit_heads.heads["3"].norm.weight, again.decoder.final_layer_norm.weight)


def test_registered_with_the_auto_classes_on_import():
    """Importing the package registers the Auto classes and does not import optional dependencies."""
    code = (
        "import sys; from transformers import AutoConfig, AutoModelForSeq2SeqLM, T5ForConditionalGeneration; "
        "before = {*sys.modules}; import hf_earlyexit; "  # transformers 5.15 imports some itself
        "print({'datasets', 'pandas', 'pyarrow', 'evaluate', 'matplotlib'} & {*sys.modules} - before); "
        "c = AutoConfig.for_model('early_exit_t5', d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2); "
        "print(type(AutoModelForSeq2SeqLM.from_config(c)).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["set()", "EarlyExitT5ForConditionalGeneration"]
    assert type(AutoConfig.for_model("early_exit_t5")) is EarlyExitT5Config


def test_other_families_are_refused_by_name(tmp_path):
    UMT5Config(num_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'umt5'.*UMT5, which has a relative bias in every block"):
        EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="config.json"):
        EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path.parent)
    with pytest.raises(ValueError, match="`config` must be a `T5Config`.*got `UMT5Config`"):
        EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path, config=UMT5Config())
    tiny_stock("tied", dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`exit_layers` has 9, but the decoder has 6"):
        EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path, early_exit=EarlyExitConfig(exit_layers=[9]))


def test_the_usual_arguments_of_from_pretrained(tmp_path):
    tiny_stock("untied", 6, torch.float32).save_pretrained(tmp_path)
    model, _ = load(tmp_path, dtype=torch.bfloat16, attn_implementation="eager", dropout_rate=0.25)
    assert model.dtype == torch.bfloat16 and model.config.dropout_rate == 0.25
    assert model.config._attn_implementation == "eager" and model.encoder.config._attn_implementation == "eager"
    assert model.decoder.config._attn_implementation == "early_exit_eager"
    by_config, _ = load(tmp_path, config=T5Config.from_pretrained(tmp_path), early_exit={"exit_layers": [3]})
    assert by_config.early_exit.exit_layers == (3,) and by_config.config.scale_decoder_outputs is False


def attend_with(stock: T5ForConditionalGeneration, implementation: str) -> None:
    for module in (
        stock,
        stock.encoder,
        stock.decoder,
    ):  # transformers 5.15 does not pass the setting on to the stacks
        module.set_attn_implementation(implementation)


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
def test_attention_implementations_agree(implementation):
    half, half_model = tiny_pair("untied", 7, torch.bfloat16)
    attend_with(half, implementation)
    half_model.set_attn_implementation(implementation)
    for seed in range(3):
        ours, theirs = (
            f(m, tiny_inputs(4, seed), seed) for f, m in ((laws.generate, half_model), (laws.stock_generate, half))
        )
        assert torch.equal(ours.logits[0], theirs.logits[0]), "the same arithmetic as stock's"
    stock, model = tiny_pair("untied", 7)
    model.set_attn_implementation(implementation)
    attend_with(stock, implementation)
    inputs = tiny_inputs(4, 7)
    laws.never_equals_stock(stock, model, inputs)
    laws.follows_frozen_rows(stock, model, inputs, pseudo_random_script(7, NUM_LAYERS))
    torch.testing.assert_close(plain_logits(model, inputs), plain_logits(stock, inputs))
    if implementation == "eager":
        attentions = model(**inputs, labels=inputs["input_ids"], output_attentions=True).decoder_attentions
        assert len(attentions) == NUM_LAYERS and all(one is not None for one in attentions)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("family", ("tied", "untied"))
def test_half_precision(dtype, family, tmp_path):
    """The residual stream of an fp16 T5 is fp32 (its `wo` is), and so are the kept hidden states."""
    tiny_stock(family, 8, torch.float32).save_pretrained(tmp_path)
    stock = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).eval()
    model, _ = load(tmp_path, dtype=dtype, early_exit=MIXED)
    assert {parameter.dtype for name, parameter in model.exit_heads.named_parameters()} == {dtype}
    inputs = tiny_inputs(4, 8)
    laws.never_equals_stock(stock, model, inputs)
    script = Scripted(pseudo_random_script(8, NUM_LAYERS))
    wish = lambda row, position: (1, 2, 3, 4, 6)[script.script(row, position) % 5]  # noqa: E731
    outputs = [
        laws.generate(model, inputs, exit_criterion=Scripted(wish), exit_threshold=0.5, fill=fill)
        for fill in ("lazy", "eager")
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    cache = outputs[0].cache
    assert cache.keys.dtype == dtype
    assert cache.kept.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    for criterion in ("softmax", "state", "entropy", "patience"):
        laws.generate(model, inputs, exit_criterion=criterion, exit_threshold=0.3)


def test_training_forward_and_gradients_are_stocks():
    stock, model = tiny_pair("untied", 9)
    inputs = tiny_inputs(3, 9)
    for one in (stock, model):
        one(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = dict(model.named_parameters())
    for name, parameter in stock.named_parameters():
        assert torch.equal(parameter.grad, gradients[name].grad), name


def test_fresh_models_from_a_configuration():
    values = {**tiny_config().to_dict(), "early_exit": MIXED.to_dict()}
    for name in ("model_type", "architectures", "transformers_version"):
        values.pop(name, None)
    model = EarlyExitT5ForConditionalGeneration(EarlyExitT5Config(**values))
    assert not model.exit_heads.heads["4"].map.weight.any() and not model.exit_heads.heads["5"].down.weight.any()
    assert model.exit_heads.heads["5"].up.weight.std() < 0.5
    assert torch.equal(model.exit_heads.heads["3"].map.weight, torch.eye(32))
    assert set(model.exit_heads.classifiers) == {"1", "2", "3", "4", "5"}
    names = [name for name, _ in model.named_parameters() if name.startswith("exit_heads")]
    assert all(parameter.isfinite().all() for parameter in model.parameters()) and names


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(family, device):
    stock, model = tiny_pair(family, 1, device=device)
    inputs = tiny_inputs(4, 1, device=device)
    laws.never_equals_stock(stock, model, inputs)
    laws.work_is_what_ran(model, inputs, exit_criterion="softmax", exit_threshold=0.1)
    outputs = [
        laws.generate(
            model, inputs, exit_criterion=Scripted(pseudo_random_script(1, NUM_LAYERS)), exit_threshold=0.5, fill=fill
        )
        for fill in ("lazy", "eager")
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)


@pytest.mark.parametrize("family", ("tied", "untied"))
def test_models_without_a_head_are_stocks(family, tmp_path):
    """`AutoModel` and `AutoModelForTextEncoding` load a saved folder without warnings about unused weights."""
    stock, model = tiny_pair(family, 1, torch.float32, early_exit=MIXED)
    model.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    inputs = tiny_inputs(3)
    for auto, call in (
        (AutoModel, inputs | {"decoder_input_ids": inputs["input_ids"]}),
        (AutoModelForTextEncoding, inputs),
    ):
        found, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert isinstance(found.config, EarlyExitT5Config) and not hasattr(found, "exit_heads")
        expected = auto.from_pretrained(tmp_path / "stock")
        assert isinstance(found, type(expected)), "of the class that the library has for T5"
        torch.testing.assert_close(found.eval()(**call)[0], expected.eval()(**call)[0], rtol=0, atol=0)
        found.save_pretrained(tmp_path / "again")
        again = auto.from_pretrained(tmp_path / "again").eval()
        torch.testing.assert_close(again(**call)[0], expected(**call)[0], rtol=0, atol=0)
