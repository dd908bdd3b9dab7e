"""Adapters, wrappers, offloading and quantisation on modules that the walk calls take effect or are refused."""

from __future__ import annotations

import functools
import tempfile

import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured

from hf_earlyexit import ClassifierConfig, EarlyExitConfig, EarlyExitT5ForConditionalGeneration
from hf_earlyexit.exits.criteria import MaxProbability
from hf_earlyexit.families.t5.stock import stock_of
from hf_earlyexit.generation.fingerprint import weights_fingerprint
from hf_earlyexit.training.shortcuts import fit_shortcuts, measure_shortcuts
from tests import laws
from tests.certificates import certificate_for
from tests.tiny import NUM_LAYERS, VOCABULARY, tiny_inputs, tiny_pair
from tests.watching import pseudo_random_script, threshold_for


HEADS = EarlyExitConfig(heads=["norm", "shared", "shortcut", "linear", "mlp"], classifier=ClassifierConfig("mlp"))
MAPS = ("decoder.block.{layer}.layer.0.SelfAttention.k", "decoder.block.{layer}.layer.0.SelfAttention.v")


# --- what can be done to a module -----------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A custom module that shows nothing of the linear map inside."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, states):
        return 1.5 * self.inner(states.flip(-1))


class Flipped(nn.Linear):
    def forward(self, states):
        return super().forward(states.flip(-1))


def wrap(model, name):
    model.set_submodule(name, Wrapped(model.get_submodule(name)))


def wrap_in_a_list(model, name):
    """Wrap a module in a class of torch, as libraries do that cast the logits."""
    module = model.get_submodule(name)
    model.set_submodule(name, nn.Sequential(module, nn.Tanh()))


def hook(model, name):
    model.get_submodule(name).register_forward_hook(lambda module, args, output: 1.5 * output.roll(1, -1))


def hook_before(model, name):
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))


def replace_the_forward(model, name):
    module = model.get_submodule(name)
    module.forward = lambda states: 1.5 * type(module).forward(module, states.flip(-1))


def replace_the_class(model, name):
    model.get_submodule(name).__class__ = Flipped


def parametrize(model, name):
    nn.utils.parametrizations.weight_norm(model.get_submodule(name))
    lengths = model.get_submodule(name).parametrizations.weight.original0
    lengths.data.mul_(torch.linspace(0.5, 2, len(lengths))[:, None])


def prune(model, name):
    l1_unstructured(model.get_submodule(name), "weight", amount=0.5)


def adapt(model, name):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=[name], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    model.to(model.dtype).eval()


def keep_a_copy(model, name):
    """Replace a module by a changed copy in a wrapper, as peft does with `modules_to_save`."""
    other = pytest.importorskip("peft.utils.other")
    wrapper = other.ModulesToSaveWrapper(model.get_submodule(name), "default")
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.mul_(-1.5)
    wrapper.set_adapter("default")
    model.set_submodule(name, wrapper)
    model.eval()


CHANGES = [
    wrap,
    wrap_in_a_list,
    hook,
    hook_before,
    replace_the_forward,
    replace_the_class,
    parametrize,
    prune,
    adapt,
    keep_a_copy,
]


def offload(model, name=""):
    """Offload the whole model with accelerate: weights are in memory only while their module is called."""
    if not hasattr(model, "_hf_hook"):
        pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))


def offload_to_a_disk(model, name=""):
    accelerate = pytest.importorskip("accelerate")
    model._folder = tempfile.TemporaryDirectory()
    accelerate.disk_offload(model, model._folder.name, execution_device=torch.device("cpu"))


def quantize_dynamically(model, name):
    """Quantise all linear maps of the decoder and the LM head dynamically."""
    torch.ao.quantization.quantize_dynamic(model.decoder, {nn.Linear}, inplace=True)
    torch.ao.quantization.quantize_dynamic(model, {"lm_head"}, inplace=True)


def quantize_weights(model, name):
    torchao = pytest.importorskip("torchao.quantization")
    chosen = lambda module, path: isinstance(module, nn.Linear) and not path.startswith("encoder")  # noqa: E731
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=chosen)


OFFLOADS = [offload, offload_to_a_disk]


def changed_pair(change, *names, seed=0, **options):
    """A stock model and an early-exit model with the same weights and the same change to the modules."""
    pair = tiny_pair("untied", seed, **options)
    for model in pair:
        for name in names:
            change(model, name)
    return pair


@functools.cache
def first_logits(**options):
    """First logits of the unchanged model."""
    return laws.generate(tiny_pair.shared("untied", 0, **options)[1], tiny_inputs(4), max_new_tokens=1).logits[0]


# --- the vocabulary head --------------------------------------------------------------------------------------------


def candidates_are_what_the_head_says(change):
    """Full depth equals stock, and as many candidates as tokens in the vocabulary change nothing."""
    stock, model = changed_pair(change, "lm_head")
    full = laws.never_equals_stock(stock, model, tiny_inputs(4))
    assert torch.equal(full.logits[0], first_logits()) == (change in OFFLOADS)
    threshold = threshold_for(model, tiny_inputs(4), MaxProbability(), max_new_tokens=6)
    settings = {"exit_criterion": "max_prob", "exit_threshold": threshold}
    plain = laws.generate(model, tiny_inputs(4), **settings)
    output = laws.generate(model, tiny_inputs(4), **settings, exit_candidates=VOCABULARY)
    assert torch.equal(output.sequences, plain.sequences) and torch.equal(output.layers_run, plain.layers_run)
    assert torch.equal(output.head_rows, plain.head_rows), "the whole head was called, and counted"
    assert not output.candidate_rows.any() and len(set(output.layers_run.flatten().tolist())) > 2


@pytest.mark.parametrize("change", [*CHANGES, *OFFLOADS], ids=lambda one: one.__name__)
def test_candidates_are_what_the_head_says(change):
    candidates_are_what_the_head_says(change)


# --- exit heads and classifiers -------------------------------------------------------------------------------------


def exits_say(model, states) -> torch.Tensor:
    """Outputs of the exits after layers 3 to 5 and of the classifier, written out in calls of their modules."""
    shortcut, linear, mlp = (model.exit_heads.heads[str(layer)] for layer in (3, 4, 5))
    normed, above = linear.norm(states), mlp.norm(states)
    outputs = [
        shortcut.norm(shortcut.map(states)),
        normed + linear.map(normed),
        above + mlp.down(torch.relu(mlp.up(above))),
        model.exit_heads.classifiers["shared"].output(model.exit_heads.classifiers["shared"].inner(states).relu()),
    ]
    return torch.cat(outputs, dim=-1)


@torch.no_grad()
def exits_are_what_their_modules_say(change, name):
    model = tiny_pair("untied", 0, early_exit=HEADS)[1]
    torch.manual_seed(1)
    for parameter in model.exit_heads.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    states = torch.randn(4, 32, dtype=torch.float64)
    before = exits_say(model, states)
    change(model, f"exit_heads.{name}")
    heads = [model.exit_heads.head_of(layer, None)(states) for layer in (3, 4, 5)]
    logits = model.exit_heads.exit_logits(3, states)[:, None]
    torch.testing.assert_close(torch.cat([*heads, logits], dim=-1), exits_say(model, states), rtol=0, atol=0)
    assert not torch.allclose(before, exits_say(model, states)), "the change changes nothing"


PARTS = ["heads.3.map", "heads.3.norm", "heads.4.map", "heads.5.up", "classifiers.shared.inner"]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("change", [wrap, hook, replace_the_forward], ids=lambda one: one.__name__)
def test_exits_are_what_their_modules_say(change, name):
    exits_are_what_their_modules_say(change, name)


def test_adapters_on_exits_are_called():
    for name in ("heads.3.map", "classifiers.shared.output", "heads.5.down"):
        exits_are_what_their_modules_say(adapt, name)


@pytest.mark.parametrize("name", ["classifiers.shared.inner", "classifiers.shared.output", "heads.3.map"])
def test_raw_states_are_computed_in_their_dtype(name):
    """Raw states can exceed the range of fp16, to which autocast would cast them."""
    model = tiny_pair("tied", 0, torch.bfloat16, early_exit=HEADS)[1]
    module = model.exit_heads.get_submodule(name)
    states = torch.full((2, 32), 1e5)
    with torch.autocast("cpu", dtype=torch.float16):
        found = module(states)
    bias = None if module.bias is None else module.bias.float()
    expected = nn.functional.linear(states, module.weight.float(), bias)
    assert found.dtype == torch.float32 and found.isfinite().all()
    torch.testing.assert_close(found, expected)


# --- offloaded models -----------------------------------------------------------------------------------------------

EXITS = [
    {"exit_criterion": "classifier", "exit_threshold": 0.45},
    {"exit_criterion": "softmax", "exit_threshold": 0.1},
    {"exit_criterion": "softmax", "exit_threshold": 0.1, "exit_candidates": 8, "num_beams": 2},
    {"exit_criterion": "state", "exit_threshold": 0.8, "fill": "eager"},
]


def offloaded_is_in_memory(change, settings):
    config = EarlyExitConfig(HEADS.exit_layers, HEADS.heads, ClassifierConfig("mlp", trained=True))
    models = [tiny_pair("untied", 1, early_exit=config)[1] for _ in range(2)]
    change(models[1], "")
    expected, output = (laws.generate(model, tiny_inputs(4), 1, **settings) for model in models)
    assert torch.equal(output.sequences, expected.sequences) and torch.equal(output.layers_run, expected.layers_run)
    torch.testing.assert_close(output.exit_confidences, expected.exit_confidences, equal_nan=True)
    assert len(set(output.layers_run.flatten().tolist()) - {0}) >= 2


@pytest.mark.parametrize("settings", EXITS, ids=str)
def test_offloaded_is_in_memory(settings):
    offloaded_is_in_memory(offload, settings)


def test_on_a_disk_is_in_memory():
    offloaded_is_in_memory(offload_to_a_disk, EXITS[0])
    offloaded_is_in_memory(offload_to_a_disk, EXITS[2])


# --- quantised models -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("change", [quantize_dynamically, quantize_weights], ids=lambda one: one.__name__)
def test_quantised_maps_are_called(change):
    """Batches of one row, since dynamic quantisation rounds a row depending on the rest of the batch."""
    config = EarlyExitConfig(HEADS.exit_layers, HEADS.heads, ClassifierConfig("mlp", trained=True))
    stock, model = changed_pair(change, "", dtype=torch.float32, early_exit=config)
    inputs = tiny_inputs(1)
    laws.never_equals_stock(stock, model, inputs)
    left = set()
    for criterion, threshold in (("max_prob", 0.05), ("classifier", 0.45)):
        settings = {"exit_criterion": criterion, "exit_threshold": threshold}
        plain = laws.generate(model, inputs, **settings)
        left |= set(plain.layers_run.flatten().tolist())
        if criterion != "classifier":
            output = laws.generate(model, inputs, **settings, exit_candidates=VOCABULARY)
            assert torch.equal(output.sequences, plain.sequences)
            assert torch.equal(output.layers_run, plain.layers_run) and not output.candidate_rows.any()
    assert len(left - {0}) >= 2
    with pytest.raises(ValueError, match="needs the plain linear maps of T5, but `lm_head` is a "):
        model.prepare_for_generation()


# --- keys and values ------------------------------------------------------------------------------------------------


def fills_follow_frozen_rows(change):
    names = [name.format(layer=layer) for layer in range(NUM_LAYERS) for name in MAPS]
    stock, model = changed_pair(change, *names)
    script = pseudo_random_script(0, NUM_LAYERS)
    laws.follows_frozen_rows(stock, model, tiny_inputs(4), script)


@pytest.mark.parametrize("change", [wrap, hook, replace_the_forward, adapt, offload], ids=lambda one: one.__name__)
def test_fills_follow_frozen_rows(change):
    fills_follow_frozen_rows(change)


# --- what the walk would bypass -------------------------------------------------------------------------------------


def hook_the_model(model):
    model.register_forward_hook(lambda *args: None)


def hook_the_decoder(model):
    """Register a hook that changes the output."""

    def steer(module, args, output):
        output.last_hidden_state = 2 * output.last_hidden_state.flip(-1)
        return output

    model.decoder.register_forward_hook(steer)


class Stack(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def wrap_the_decoder(model):
    model.decoder = Stack(model.decoder)


def wrap_a_block(model):
    model.decoder.block[1] = Stack(model.decoder.block[1])


def wrap_an_attention(model):
    part = model.decoder.block[1].layer[0]
    part.SelfAttention = Stack(part.SelfAttention)


def replace_an_attentions_forward(model):
    """Replace a `forward` so that it changes the input of keys and values."""
    attention = model.decoder.block[1].layer[0].SelfAttention
    attention.forward = lambda states, **kwargs: type(attention).forward(attention, states.flip(-1), **kwargs)


def hook_before_an_attention(model):
    part = model.decoder.block[2].layer[1].EncDecAttention
    part.register_forward_pre_hook(lambda module, args: (args[0].flip(-1), *args[1:]))


def offload_whole_blocks(model):
    accelerate = pytest.importorskip("accelerate")
    if "_hf_hook" not in vars(model):
        device = torch.device("cpu")
        accelerate.cpu_offload(model, execution_device=device, preload_module_classes=["T5Block"])


PASSED_BY = [
    (hook_the_model, "hooks of the model, which is not called as a whole: remove them"),
    (hook_the_decoder, "hooks of `decoder`, which is not called as a whole"),
    (wrap_the_decoder, "`decoder`, a `Stack` in place of the library's: put that back"),
    (wrap_a_block, "`decoder.block.1`, a `Stack` in place of the library's"),
    (wrap_an_attention, "`decoder.block.1.layer.0.SelfAttention`, a `Stack`"),
    (
        replace_an_attentions_forward,
        "`decoder.block.1.layer.0.SelfAttention`, a `T5Attention` with a `forward` of its",
    ),
    (hook_before_an_attention, "hooks before `decoder.block.2.layer.1.EncDecAttention`"),
    (offload_whole_blocks, "`decoder.block.0.layer.0.layer_norm`, whose weights are on the meta device"),
]


@pytest.mark.parametrize("change, message", PASSED_BY, ids=lambda one: getattr(one, "__name__", ""))
def test_what_would_be_passed_by_is_refused_and_is_stock_at_full_depth(change, message, monkeypatch):
    stock, model = tiny_pair("untied", 0)
    for one in (stock, model):
        change(one)
    call = {**tiny_inputs(2), "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    expected, output = stock.generate(**call), model.generate(**call, early_exit=False)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.logits, expected.logits)
    monkeypatch.setattr(model.encoder, "forward", None)
    with pytest.raises(ValueError, match=f"Early exit does not go with {message}"):
        model.generate(**call, exit_criterion="softmax", exit_threshold=0.5)
    with pytest.raises(ValueError, match=f"`prepare_for_generation` does not go with {message}"):
        model.prepare_for_generation()


def test_a_compiled_block_is_the_librarys():
    stock, model = tiny_pair("untied", 0)
    model.decoder.block[1] = torch.compile(model.decoder.block[1], backend="eager")
    script = pseudo_random_script(0, NUM_LAYERS)
    laws.follows_frozen_rows(stock, model, tiny_inputs(2), script, max_new_tokens=6)


# --- what reads weights ---------------------------------------------------------------------------------------------


READERS = {
    "fit_shortcuts": lambda model, folder: fit_shortcuts(model, [], progress=False),
    "measure_shortcuts": lambda model, folder: measure_shortcuts(model, [], progress=False),
    "stock_of": lambda model, folder: stock_of(model),
    "save_stock": lambda model, folder: model.save_stock(folder),
    "weights_fingerprint": lambda model, folder: weights_fingerprint(model),
    "prepare_for_generation": lambda model, folder: model.prepare_for_generation(),
}
UNREADABLE = [
    *((reader, offload, "", "on the meta device|offloaded") for reader in READERS),
    *((reader, adapt, "lm_head", "lm_head") for reader in ("stock_of", "prepare_for_generation")),
    *((reader, quantize_dynamically, "", "lm_head|decoder.block") for reader in ("stock_of", "weights_fingerprint")),
    ("weights_fingerprint", quantize_weights, "", "`decoder.block.* of type `Int8Tensor`"),
    *(
        ("fit_shortcuts", change, "exit_heads.heads.3.map", "`exit_heads.heads.3.map`")
        for change in (adapt, wrap, hook)
    ),
    ("measure_shortcuts", adapt, "exit_heads.heads.3.map", "`exit_heads.heads.3.map`"),
    ("measure_shortcuts", hook, "exit_heads.heads.3.norm", "`exit_heads.heads.3.norm`"),
    ("fit_shortcuts", wrap, "exit_heads.heads.3", "`exit_heads.heads.3` is a `.*Wrapped`, not a shortcut"),
]


@pytest.mark.parametrize("reader, change, name, message", UNREADABLE, ids=lambda one: getattr(one, "__name__", one))
def test_what_cannot_be_read_is_refused_by_name(reader, change, name, message, tmp_path):
    model = tiny_pair("untied", 0, torch.float32, early_exit=HEADS)[1]
    change(model, name)
    with pytest.raises(ValueError, match=message):
        READERS[reader](model, tmp_path)
    assert not any(tmp_path.iterdir())


def test_unreadable_weights_are_not_the_certified_ones():
    """A strict call with unreadable weights is refused, and full depth is unchanged."""
    model = tiny_pair("tied", 0, torch.float32)[1]
    setting = {"exit_criterion": "softmax", "exit_threshold": 0.5}
    model.certify(certificate_for(model, setting, max_new_tokens=3))
    expected = model.generate(**tiny_inputs(1), early_exit=False)
    model.generate(**tiny_inputs(1), strict_certificate=True)
    offload(model)
    assert torch.equal(model.generate(**tiny_inputs(1), early_exit=False), expected)
    with pytest.raises(ValueError, match="not covered: .*the weights are not the certified ones"):
        model.generate(**tiny_inputs(1), strict_certificate=True)


def test_new_heads_are_not_made_on_a_disk(tmp_path):
    stock = tiny_pair("tied", 0, torch.float32)[0]
    stock.save_pretrained(tmp_path / "plain")
    options = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offloaded"}
    load = EarlyExitT5ForConditionalGeneration.from_pretrained
    with pytest.raises(
        ValueError,
        match="plain' lacks `exit_heads.classifiers.*`, which cannot be initialised while offloaded to disk",
    ):
        load(tmp_path / "plain", early_exit=HEADS, **options)
    load(tmp_path / "plain", early_exit=HEADS).save_pretrained(tmp_path / "with heads")
    in_memory, on_disk = load(tmp_path / "with heads"), load(tmp_path / "with heads", **options)
    settings = {"exit_criterion": "softmax", "exit_threshold": 0.1}
    expected, output = (
        laws.generate(one, tiny_inputs(2), max_new_tokens=5, **settings) for one in (in_memory, on_disk)
    )
    assert torch.equal(output.sequences, expected.sequences) and torch.equal(output.layers_run, expected.layers_run)


def test_what_is_quantised_afterwards_is_noticed():
    """Quantisation drops a prepared copy, and a certificate does not cover the new weights."""
    models = [tiny_pair("untied", 0, torch.float32)[1] for _ in range(2)]
    models[0].certify(certificate_for(models[0], {"exit_criterion": "softmax", "exit_threshold": 0.5}))
    models[0].prepare_for_generation()
    for model in models:
        quantize_weights(model, "")
    with pytest.warns(UserWarning, match="since `prepare_for_generation`, so its copy is dropped"):
        output = laws.generate(models[0], tiny_inputs(2), early_exit=False)
    assert torch.equal(output.sequences, laws.generate(models[1], tiny_inputs(2)).sequences)
    with pytest.raises(ValueError, match="not covered: .*the weights are not the certified ones"):
        models[0].generate(**tiny_inputs(2), strict_certificate=True)
