"""Invalid arguments are refused with a message, before any work is done and without changing the model."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import CompileConfig, DynamicCache, EncoderDecoderCache, GenerationConfig, StaticCache

from hf_earlyexit import ClassifierConfig, EarlyExitCache, EarlyExitConfig
from hf_earlyexit.common.library import CACHE
from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.exits.criteria import SoftmaxResponse
from tests.tiny import NUM_LAYERS, tiny_inputs, tiny_pair


ON = {"exit_criterion": "softmax", "exit_threshold": 0.5}

BAD_ARGUMENTS = [
    ({"exit_criterion": "sofmax", "exit_threshold": 0.5}, "`exit_criterion` must be one of .*'softmax'.*got 'sofmax'"),
    ({"exit_criterion": 3, "exit_threshold": 0.5}, "`exit_criterion` must be one of .*object of your own"),
    ({"exit_criterion": ExitSettings, "exit_threshold": 0.5}, "`exit_criterion` must be one of"),
    ({"exit_criterion": "softmax"}, "'softmax'` needs an `exit_threshold` in \\[0, 1\\]"),
    ({"exit_threshold": 0.5}, "needs an `exit_criterion`: one of"),
    ({"early_exit": True}, "needs an `exit_criterion`: one of"),
    ({"fill": "eager"}, "`fill` does nothing without an `exit_criterion`"),
    ({"batch_exit": "row", "exit_schedule": "calm"}, "`batch_exit` does nothing without"),
    ({"early_exit": "no"}, "`early_exit` must be True or False, got 'no'"),
    ({"exit_criterion": "softmax", "exit_threshold": 1.5}, "`exit_threshold` must be a number in \\[0, 1\\], got 1.5"),
    ({"exit_criterion": "softmax", "exit_threshold": "high"}, "`exit_threshold` must be a number"),
    ({"exit_criterion": "softmax", "exit_threshold": True}, "`exit_threshold` must be a number"),
    ({"exit_criterion": "fixed"}, "needs `exit_layer`"),
    ({"exit_criterion": "fixed", "exit_layer": 0}, "`exit_layer` must be an integer from 1 on, got 0"),
    ({"exit_criterion": "fixed", "exit_layer": 2.0}, "`exit_layer` must be an integer"),
    ({"exit_criterion": "fixed", "exit_layer": 7}, "`exit_layer=7` is not an exit point .*\\[1, 2, 3, 4, 5, 6\\]"),
    ({"exit_criterion": "fixed", "exit_layer": 2, "exit_threshold": 0.5}, "`exit_threshold=0.5` does not go with"),
    (ON | {"exit_layer": 2}, '`exit_layer=2` goes with `exit_criterion="fixed"`'),
    (ON | {"exit_layers": 3}, "`exit_layers` must be a list, got 3"),
    (ON | {"exit_layers": [3, 2]}, "`exit_layers` must ascend .* got \\[3, 2\\]"),
    (
        ON | {"exit_layers": [2, 7]},
        "`exit_layers=\\[2, 7\\]` has \\[7\\], which are no exit points .*\\[1, 2, 3, 4, 5\\]",
    ),
    ({"exit_layers": [2]}, "`exit_layers` does nothing without an `exit_criterion`"),
    (
        {"exit_criterion": "fixed", "exit_layer": 2, "exit_layers": [2]},
        "`exit_layers=\\[2\\]` does not go with .*fixed",
    ),
    (ON | {"exit_candidates": 1}, "`exit_candidates` must be an integer from 2 on, got 1.*leave it out"),
    (ON | {"exit_candidates": 4.0}, "`exit_candidates` must be an integer from 2 on, got 4.0"),
    (ON | {"exit_candidates": True}, "`exit_candidates` must be an integer from 2 on, got True"),
    (ON | {"exit_candidates": 98}, "`exit_candidates=98` is more than the vocabulary of this model, 97: .*name fewer"),
    (
        {"exit_criterion": "state", "exit_threshold": 0.5, "exit_candidates": 8},
        "`exit_candidates=8` goes with .*head, one of \\['softmax', 'max_prob', 'entropy', 'patience'\\], not 'state'",
    ),
    (
        {"exit_criterion": "fixed", "exit_layer": 2, "exit_candidates": 8},
        "`exit_candidates=8` goes with .*not 'fixed': leave it out",
    ),
    (
        {"exit_criterion": SoftmaxResponse(), "exit_threshold": 0.5, "exit_candidates": 8},
        "`exit_candidates=8` goes with .*not SoftmaxResponse",
    ),
    ({"exit_candidates": 8}, "`exit_candidates` does nothing without an `exit_criterion`"),
    (ON | {"batch_exit": "rows"}, "`batch_exit` must be one of .*'row'.*got 'rows'"),
    (ON | {"fill": "late"}, "`fill` must be one of .*'lazy'.*got 'late'"),
    (ON | {"exit_schedule": "decay"}, "`exit_schedule` must be one of .*'calm'.*got 'decay'"),
    (ON | {"exit_schedule": {"name": "calm", "tow": 3}}, "`exit_schedule=.*may have \\['name', 'tau'\\]"),
    (ON | {"exit_schedule": {"name": "calm", "tau": "fast"}}, "`tau` .*must be a number from 0 on, got 'fast'"),
    (ON | {"exit_schedule": {"tau": 4}}, "`exit_schedule` must be one of"),
    ({"exit_criterion": "classifier", "exit_threshold": 0.5}, "has no exit classifiers"),
    (ON | {"use_cache": False}, "`use_cache=False`"),
    (ON | {CACHE: EncoderDecoderCache(DynamicCache(), DynamicCache())}, f"`{CACHE}` of type Enc"),
    (ON | {"cache_implementation": "offloaded_static"}, "`cache_implementation='offloaded_static'`: use .static"),
    (ON | {"cache_implementation": "offloaded"}, "`cache_implementation='offloaded'`"),
    (ON | {"cache_implementation": "paged"}, "paged"),
    (ON | {"output_attentions": True, "return_dict_in_generate": True}, "`output_attentions=True`"),
    (ON | {"output_hidden_states": True, "return_dict_in_generate": True}, "`output_hidden_states=True`"),
    (ON | {"prompt_lookup_num_tokens": 3}, "generation mode 'assisted_generation'"),
    (ON | {"custom_generate": lambda model, ids, **kwargs: ids}, "`custom_generate`"),
    (ON | {"custom_generate": "somebody/loop"}, "`custom_generate`"),
    (ON | {"synced_gpus": True}, "`synced_gpus=True`"),
    (ON | {"prefill_chunk_size": 4}, "`prefill_chunk_size=4`"),
    (ON | {"guidance_scale": 2.0}, "`guidance_scale=2.0`"),
    (ON | {"assistant_model": "another"}, "`assistant_model`"),
    (ON | {"is_assistant": True}, "being the assistant of another model"),
    (ON | {"exit_treshold": 0.5}, "exit_treshold"),
    (ON | {"exit_schedule": {"name": "calm", "tau": float("nan")}}, "`tau` .*must be a number from 0 on, got nan"),
    (ON | {"compile_config": CompileConfig()}, "`compile_config` alone: add `cache_implementation"),
    (
        ON | {"cache_implementation": "static", "compile_config": CompileConfig(dynamic=True)},
        "`compile_config` with dynamic=True: leave it out",
    ),
    (ON | {"negative_prompt_ids": torch.ones(2, 3)}, "`negative_prompt_ids`"),
    (ON | {"decoder_inputs_embeds": torch.ones(2, 1, 32)}, "`decoder_inputs_embeds`: pass `decoder_input_ids`"),
]


@pytest.fixture(scope="module")
def model():
    return tiny_pair("tied", 0)[1]


@pytest.mark.parametrize("arguments, message", BAD_ARGUMENTS, ids=lambda one: str(one)[:60])
def test_bad_arguments_are_refused_by_name(model, arguments, message, monkeypatch):
    def encoder_ran(*args, **kwargs):
        raise AssertionError("work was done before the refusal")

    monkeypatch.setattr(model.encoder, "forward", encoder_ran)
    before = copy.deepcopy(model.generation_config.to_dict()), model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        model.generate(**tiny_inputs(2), max_new_tokens=3, **arguments)
    assert (model.generation_config.to_dict(), model.config.to_dict()) == before


def test_training_mode_is_refused(model):
    model.train()
    try:
        with pytest.raises(ValueError, match="training mode: call `model.eval\\(\\)`"):
            model.generate(**tiny_inputs(2), max_new_tokens=3, **ON)
    finally:
        model.eval()


def test_untrained_classifiers_are_refused_with_the_remedy():
    config = EarlyExitConfig(classifier=ClassifierConfig("mlp", shared=False))
    _, model = tiny_pair("tied", 0, early_exit=config)
    call = {"exit_criterion": "classifier", "exit_threshold": 0.5, "return_dict_in_generate": True}
    with pytest.raises(ValueError, match="untrained.*then set `model.config.early_exit.*trained.* = True`"):
        model.generate(**tiny_inputs(2), max_new_tokens=3, **call)
    model.config.early_exit["classifier"]["trained"] = True
    output = model.generate(**tiny_inputs(2), max_new_tokens=3, **call)
    assert (output.layers_run[output.layers_run > 0] < NUM_LAYERS).any()


def test_attention_without_live_rows_is_refused(model):
    _, other = tiny_pair("tied", 0)
    other.decoder.config._attn_implementation = other.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="`attn_implementation='flex_attention'`: use 'sdpa' or 'eager'"):
        other.generate(**tiny_inputs(2), max_new_tokens=3, **ON)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": 3}, "this call needs"),
        ({"batch_size": 5}, "this call needs"),
        ({"dtype": torch.float16}, "dtype"),
        ({"fill": "eager"}, "fill"),
    ],
)
def test_own_cache_must_fit(model, changes, message):
    shape = {"num_layers": NUM_LAYERS, "batch_size": 2, "num_heads": 4, "head_dim": 8, "dtype": torch.float64}
    cache = EarlyExitCache(**(shape | changes))
    with pytest.raises(ValueError, match=f"`{CACHE}`.*{message}"):
        model.generate(**tiny_inputs(2), max_new_tokens=3, fill="lazy", **{CACHE: cache}, **ON)


def test_own_cache_serves_again_after_reset(model):
    cache = EarlyExitCache(NUM_LAYERS, 2, 4, 8, dtype=torch.float64, capacity=1)
    first = model.generate(**tiny_inputs(2), max_new_tokens=6, **{CACHE: cache}, **ON)
    with pytest.raises(ValueError, match="call its `reset\\(\\)`"):
        model.generate(**tiny_inputs(2), max_new_tokens=6, **{CACHE: cache}, **ON)
    cache.reset()
    again = model.generate(**tiny_inputs(2), max_new_tokens=6, **{CACHE: cache}, **ON)
    assert torch.equal(first, again)
    with pytest.raises(ValueError, match="belongs to a `generate` call"):
        model(**tiny_inputs(2), decoder_input_ids=torch.zeros(2, 1, dtype=torch.long), **{CACHE: cache})


def test_a_criterion_that_gives_nonsense_is_named(model):
    class Nonsense:
        def __init__(self, value):
            self.value = value

        def confidence(self, point):
            return self.value

    for value, found in ((0.5, "float"), (torch.ones(7), "\\[7\\]"), (None, "NoneType")):
        with pytest.raises(
            ValueError, match=f"`exit_criterion` Nonsense must give a tensor of shape \\[2\\].*got {found}"
        ):
            model.generate(**tiny_inputs(2), max_new_tokens=3, exit_criterion=Nonsense(value), exit_threshold=0.5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"exit_layers": [0, 1]}, "`exit_layers` must be integers from 1"),
        ({"exit_layers": [2, 1]}, "`exit_layers` must ascend"),
        ({"exit_layers": [1, 1]}, "`exit_layers` must ascend"),
        ({"exit_layers": [True]}, "`exit_layers` must be integers"),
        ({"exit_layers": [2, 6]}, "`exit_layers` has 6, but the decoder has 6 layers"),
        ({"heads": "big"}, "`heads` must be of the kinds"),
        ({"exit_layers": [1, 2], "heads": ["norm"]}, "`heads` names 1 kinds for 2 exit layers"),
        ({"classifier": {"kind": "tree"}}, "Classifier `kind` must be one of"),
        ({"classifier": {"width": 0}}, "Classifier `width` must be a positive integer"),
        ({"exit_layers": 3}, "`exit_layers` must be a list, got 3"),
        ({"heads": None}, "`heads` must be a kind or a list of kinds, got None"),
        ({"classifier": True}, "`classifier` must be a `ClassifierConfig`"),
        ({"classifier": {"trained": "yes"}}, "Classifier `trained` must be True or False, got 'yes'"),
        ({"classifier": {"depth": 2}}, "ClassifierConfig has no \\['depth'\\]"),
    ],
)
def test_bad_configurations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EarlyExitConfig(**arguments).for_layers(NUM_LAYERS)
    with pytest.raises(ValueError, match="EarlyExitConfig has no \\['exits'\\]"):
        EarlyExitConfig.from_dict({"exits": 1})


def test_what_early_exit_refuses_works_at_full_depth_as_in_stock():
    stock, model = tiny_pair("tied", 0, num_layers=NUM_LAYERS)
    inputs = tiny_inputs(1)
    for extra in (
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 2},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {CACHE: EncoderDecoderCache(*(StaticCache(model.config, max_cache_len=n) for n in (9, 11)))},
    ):
        expected = stock.generate(**inputs, max_new_tokens=8, **copy.deepcopy(extra))
        output = model.generate(**inputs, max_new_tokens=8, early_exit=False, **copy.deepcopy(extra))
        if "return_dict_in_generate" in extra:
            expected, output = expected.sequences, output.sequences
        assert torch.equal(expected, output)


def test_what_cannot_be_compiled_is_stock_at_full_depth():
    stock, model = tiny_pair("tied", 0, num_layers=NUM_LAYERS)
    call = {**tiny_inputs(2), "max_new_tokens": 8, "cache_implementation": "static"}
    seen = []
    model.decoder.block[1].register_forward_hook(lambda *args: seen.append(1))
    assert torch.equal(model.generate(**call, early_exit=False), stock.generate(**call))
    assert seen and not model.is_prepared
    with pytest.raises(ValueError, match="would not call the hooks of `decoder.block.1`"):
        model.generate(**call, **ON)


def test_ranks_that_share_weights_are_refused(model):
    """With sharded weights the library sets `synced_gpus` itself, after the caller's arguments were checked."""
    sample, calls = type(model)._sample, []

    def synced(self, *args, **kwargs):
        calls.append(1)
        return sample(self, *args, **(kwargs | {"synced_gpus": True}))

    expected = model.generate(**tiny_inputs(2), max_new_tokens=5, early_exit=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "_sample", synced)
        patch.setattr(type(model), "_has_unfinished_sequences", lambda self, done, synced_gpus, device: not done)
        with pytest.raises(ValueError, match="spread over ranks"):
            model.generate(**tiny_inputs(2), max_new_tokens=5, **ON)
        assert torch.equal(model.generate(**tiny_inputs(2), max_new_tokens=5, early_exit=False), expected)
    assert len(calls) == 2


def test_positional_arguments_are_refused_too(model):
    inputs, assistant = tiny_inputs(2)["input_ids"], "another"
    with pytest.raises(ValueError, match="`assistant_model`"):
        model.generate(inputs, None, None, None, None, None, assistant, max_new_tokens=3, **ON)


def test_a_model_over_several_devices_is_refused(model, monkeypatch):
    monkeypatch.setattr(model, "hf_device_map", {"encoder": 0, "decoder": 1}, raising=False)
    with pytest.raises(ValueError, match="spread over several devices"):
        model.generate(**tiny_inputs(2), max_new_tokens=3, **ON)


def test_deep_decoders_fall_back_to_stock_too():
    _, model = tiny_pair("deeper decoder", 0)
    expected = model.generate(**tiny_inputs(1), max_new_tokens=6)
    for extra in ({"output_hidden_states": True, "return_dict_in_generate": True}, {"prompt_lookup_num_tokens": 2}):
        output = model.generate(**tiny_inputs(1), max_new_tokens=6, **extra)
        assert torch.equal(output.sequences if "return_dict_in_generate" in extra else output, expected)


def test_objects_in_the_generation_config_are_not_saved_away(tmp_path):
    _, model = tiny_pair("tied", 0)
    model.generation_config.exit_criterion, model.generation_config.exit_threshold = SoftmaxResponse(), 0.5
    with pytest.raises(ValueError, match="`generation_config.exit_criterion` is an object.*set it to a name"):
        model.save_pretrained(tmp_path)


def test_own_loops_are_the_librarys_at_full_depth():
    seen = {}

    def loop(model, input_ids, generation_config, **kwargs):
        seen["cache"], seen["names"] = kwargs.pop(CACHE), set(kwargs)
        return input_ids

    _, model = tiny_pair("tied", 0)
    model.generate(**tiny_inputs(1), max_new_tokens=3, custom_generate=loop)
    assert isinstance(seen["cache"], EncoderDecoderCache) and not any("exit" in name for name in seen["names"])


def test_settings_merge_call_over_passed_over_stored():
    stored = GenerationConfig(exit_criterion="state", exit_threshold=0.9, batch_exit="batch", early_exit=True)
    passed = GenerationConfig(exit_threshold=0.7)
    merge = ExitSettings.merge
    assert merge({}, None, GenerationConfig()) == ExitSettings()
    assert merge({}, None, stored) == ExitSettings(True, "state", 0.9, batch_exit="batch")
    assert merge({}, passed, stored).exit_threshold == 0.7
    assert merge({"exit_threshold": 0.6}, passed, stored).exit_threshold == 0.6
    assert merge({"exit_threshold": None}, passed, stored).early_exit is False
    assert merge({"early_exit": False}, passed, stored).early_exit is False
    assert merge({"exit_criterion": "fixed", "exit_layer": 2}, None, stored).schedule.threshold == 0.5
    assert merge(
        {"exit_criterion": "softmax", "exit_threshold": 0.1}, GenerationConfig(early_exit=False), stored
    ).early_exit
    assert merge({"exit_layer": 2}, None, GenerationConfig(exit_criterion="fixed", early_exit=False)).early_exit
    with pytest.raises(ValueError, match="needs an `exit_threshold`"):
        merge({"exit_criterion": "softmax"}, None, stored)
    off = GenerationConfig(exit_criterion="state", exit_threshold=0.9, early_exit=False)
    assert merge({}, None, off).early_exit is False
    assert merge({"exit_threshold": 0.5}, None, off).early_exit is True
