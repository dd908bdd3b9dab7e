"""Transformers names that differ between releases, and private Transformers names, are used in one module only."""

from __future__ import annotations

import ast
import functools
import inspect
import pickle
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedConfig, T5ForConditionalGeneration
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import logging

import hf_earlyexit
from hf_earlyexit import EarlyExitCache
from hf_earlyexit.common import library
from hf_earlyexit.common.library import CACHE, CACHE_NAMES, HOOKS, with_cache_name
from hf_earlyexit.families.t5.stock import stock_generate
from tests import laws
from tests.tiny import NUM_LAYERS, stock_cache, tiny_inputs, tiny_pair


FOLDER = Path(hf_earlyexit.__file__).parent


@pytest.fixture(scope="module")
def pair():
    return tiny_pair("tied", 0)


def own_cache(model, rows: int) -> EarlyExitCache:
    config = model.config
    return EarlyExitCache(NUM_LAYERS, rows, config.num_heads, config.d_kv, dtype=model.dtype)


# --- the cache by either name ---------------------------------------------------------------------------------------


def test_the_name_is_the_installed_librarys():
    assert CACHE in {field.name for field in fields(Seq2SeqLMOutput)}
    assert CACHE in inspect.signature(T5ForConditionalGeneration.forward).parameters
    assert CACHE in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    release = tuple(map(int, transformers.__version__.split(".")[:2]))
    assert (CACHE == "cache") == (release >= (5, 24))


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_is_taken_by_either_name(pair, name, beams):
    _, model = pair
    settings = {"exit_criterion": "softmax", "exit_threshold": 0.1, "num_beams": beams}
    expected = laws.generate(model, tiny_inputs(2), **settings)
    cache = own_cache(model, 2 * beams)
    output = laws.generate(model, tiny_inputs(2), **settings, **{name: cache})
    assert torch.equal(output.sequences, expected.sequences) and output.cache is cache


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_stock_cache_is_taken_by_either_name_at_full_depth(pair, name):
    stock, model = pair
    cache, inputs = stock_cache(), tiny_inputs(2)
    output = laws.generate(model, inputs, early_exit=False, **{name: cache})
    assert torch.equal(output.sequences, laws.stock_generate(stock, inputs).sequences)
    assert output[CACHE] is cache
    ids = torch.zeros(2, 1, dtype=torch.long)
    assert model(**inputs, decoder_input_ids=ids, use_cache=True, **{name: stock_cache()})[CACHE].get_seq_length() == 1


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_stock_cache_with_exits_is_refused_by_name(pair, name):
    _, model = pair
    with pytest.raises(ValueError, match=f"`{CACHE}` of type EncoderDecoderCache: leave it out"):
        laws.generate(model, tiny_inputs(2), exit_criterion="state", exit_threshold=0.5, **{name: stock_cache()})
    with pytest.raises(ValueError, match="An `EarlyExitCache` belongs to a `generate` call"):
        model(
            **tiny_inputs(2),
            decoder_input_ids=torch.zeros(2, 1, dtype=torch.long),
            **{name: own_cache(model, 2)},
        )


def test_a_cache_by_both_names_is_refused(pair):
    _, model = pair
    both = {name: own_cache(model, 2) for name in CACHE_NAMES}
    with pytest.raises(ValueError, match="`cache` and `past_key_values` are two names of one argument"):
        laws.generate(model, tiny_inputs(2), **both)
    with pytest.raises(ValueError, match="`cache` and `past_key_values` are two names of one argument"):
        model(**tiny_inputs(2), **both)
    assert with_cache_name({"cache": None, "past_key_values": 1, "use_cache": True}) == {CACHE: 1, "use_cache": True}
    assert with_cache_name({"cache": 1, "past_key_values": None}) == {CACHE: 1}
    assert with_cache_name({"use_cache": False}) == {"use_cache": False}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"early_exit": False}, {"exit_criterion": "softmax", "exit_threshold": 0.1}])
def test_outputs_have_the_cache_by_both_names(pair, beams, settings):
    """Attribute and key by the installed name; attribute only by the other name."""
    _, model = pair
    output = laws.generate(model, tiny_inputs(2), num_beams=beams, **settings)
    assert isinstance(output[CACHE], EarlyExitCache) and output.get(CACHE) is output[CACHE]
    assert output.cache is output[CACHE] and output.past_key_values is output[CACHE]
    assert [name for name in output if name in CACHE_NAMES] == [CACHE]
    again = pickle.loads(pickle.dumps({name: output[name] for name in ("sequences", "layers_run")}))
    assert torch.equal(again["layers_run"], output.layers_run)


def test_the_cache_answers_what_the_library_asks(pair):
    """Without these properties, Transformers would treat the cache as one of linear attention layers."""
    cache = own_cache(pair[1], 3)
    lists = [name for name in ("is_sliding", "is_linear", "is_dummy") if hasattr(Cache, name)]
    assert all(getattr(cache, name) == [False] * NUM_LAYERS for name in lists)
    assert cache.batch_size == 3 and not cache.is_compileable and cache.is_croppable
    assert cache.get_seq_length() == cache.get_query_offset() == 0 if hasattr(Cache, "get_query_offset") else True


# --- no warning comes from this package -----------------------------------------------------------------------------

CALLS = {
    "greedy": {"early_exit": False},
    "exits": {"exit_criterion": "softmax", "exit_threshold": 0.1},
    "recorded": {"exit_criterion": "softmax", "exit_threshold": 0.1, "record_exits": True},
    "sampling": {"exit_criterion": "softmax", "exit_threshold": 0.1, "do_sample": True, "num_return_sequences": 2},
    "beams": {"exit_criterion": "softmax", "exit_threshold": 0.1, "num_beams": 3},
    "beams at full depth": {"num_beams": 3, "early_exit": False},
    "beam sampling": {"exit_criterion": "state", "exit_threshold": 0.9, "num_beams": 3, "do_sample": True},
    "static, not compiled": {"cache_implementation": "static", "disable_compile": True, "early_exit": False},
    "left to the library": {"early_exit": False, "output_hidden_states": True},
}


@pytest.fixture
def strict(monkeypatch):
    """Every warning, and every logged deprecation of Transformers, is an error."""

    def says(self, message, *args, **kwargs):
        raise AssertionError(f"logged: {message}")

    monkeypatch.setattr(type(logging.get_logger("transformers")), "warning_once", says)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("call", CALLS)
def test_generate_does_not_warn(pair, strict, call, prepared):
    _, model = pair
    if prepared:
        model.prepare_for_generation()
    try:
        output = laws.generate(model, tiny_inputs(2), **CALLS[call])
        assert output[CACHE] is not None
    finally:
        model.unprepare()


@pytest.mark.parametrize("family", ["tied", "deeper decoder"])
def test_stock_models_training_and_files_do_not_warn(strict, tmp_path, family):
    _, model = tiny_pair(family, 0)
    labels = tiny_inputs(2)["input_ids"]
    assert model(**tiny_inputs(2), labels=labels).loss.isfinite()
    assert model(**tiny_inputs(2), labels=labels, exit_objective=lambda exits: exits.logits(1).mean()).loss is not None
    stock = hf_earlyexit.families.t5.stock.stock_of(model)
    assert stock_generate(stock, **tiny_inputs(2), max_new_tokens=3).shape[1] > 1
    model.save_pretrained(tmp_path)
    type(model).from_pretrained(tmp_path)


def test_a_planted_old_name_is_noticed(pair, strict):
    """The fixture works: on releases that renamed the cache, the old name warns."""
    stock, _ = pair
    old = {"past_key_values": stock_cache()}
    ids = torch.zeros(2, 1, dtype=torch.long)
    if CACHE == "past_key_values":
        assert stock(**tiny_inputs(2), decoder_input_ids=ids, **old).past_key_values is old["past_key_values"]
        return
    with pytest.raises(FutureWarning, match="`past_key_values` is deprecated"):
        stock(**tiny_inputs(2), decoder_input_ids=ids, **old)
    with pytest.raises(AssertionError, match="logged: `past_key_values`"):
        stock(**tiny_inputs(2), decoder_input_ids=ids).past_key_values  # noqa: B018


# --- private names --------------------------------------------------------------------------------------------------


def private_names(tree: ast.AST) -> dict[str, set[str]]:
    """Names with one leading underscore.

    Grouped by those read as attributes or passed as keywords, those read on `super()`, and those that the code
    defines.
    """
    found: dict[str, set[str]] = {"read": set(), "of super": set(), "defined": set()}
    is_private = lambda name: name is not None and name.startswith("_") and not name.startswith("__")  # noqa: E731
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            is_super = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", None) == "super"
            kind = "defined" if isinstance(node.ctx, ast.Store) else "of super" if is_super else "read"
            found[kind].add(node.attr)
        elif isinstance(node, ast.keyword) and is_private(node.arg):
            found["read"].add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) and is_private(node.name):
            found["defined"].add(node.name)
    return found


@functools.cache
def names_by_module() -> dict[str, dict[str, set[str]]]:
    paths = sorted(FOLDER.rglob("*.py"))
    return {path.relative_to(FOLDER).as_posix(): private_names(ast.parse(path.read_text())) for path in paths}


def names_of_the_library() -> set[str]:
    """Private names of the base classes of our classes, and of Transformers' configs."""
    classes = [T5ForConditionalGeneration, PreTrainedConfig, Cache, GenerationConfig]
    own = (
        {name for kind in classes for name in dir(kind)}
        | set(vars(GenerationConfig()))
        | set(vars(PreTrainedConfig()))
    )
    of_torch = set(dir(torch.nn.Module))
    return {name for name in own - of_torch if name.startswith("_") and not name.startswith("__")}


def test_private_names_of_the_library_are_read_in_one_module():
    library_names = names_of_the_library() | {"_raise_exceptions_for_missing_entries"}
    for module, names in names_by_module().items():
        if module == "common/library.py":
            continue
        stray = (names["read"] & library_names) - set(HOOKS)
        assert not stray, (
            f"{module} reads {sorted(stray)}, private names of transformers: only `common/library.py` may"
        )
        stored = (names["defined"] & library_names) - set(HOOKS)
        assert not stored, (
            f"{module} sets {sorted(stored)}, private names of transformers: only `common/library.py` may"
        )


def test_hooks_are_those_that_are_overridden():
    """`HOOKS` lists exactly the private methods that our classes override or call on their parent."""
    called = set().union(*(names["of super"] for names in names_by_module().values()))
    assert called & names_of_the_library() == set(HOOKS)


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_are_as_our_overrides_take_them(name):
    found = list(inspect.signature(getattr(T5ForConditionalGeneration, name)).parameters)[1:]
    assert tuple(found[: len(HOOKS[name])]) == HOOKS[name]


def test_a_private_name_elsewhere_is_noticed():
    names = private_names(ast.parse("x = config._attn_implementation; super()._sample(); f(_raise_x=1)"))
    assert names["read"] == {"_attn_implementation", "_raise_x"} and names["of super"] == {"_sample"}
    assert "_attn_implementation" in names_of_the_library()
    read = names_by_module()["common/library.py"]
    assert {"_from_model_config", "_attn_implementation"} <= read["read"] | read["defined"]


def test_the_module_says_what_it_knows(tmp_path):
    config = GenerationConfig()
    library.keep_generation_settings(config)
    assert config._from_model_config is False
    assert "num_beams" in library.usual_generation_values(config)
    assert library.file_if_there(tmp_path, "nothing.json") is None
    (tmp_path / "nothing.json").write_text("{}")
    assert Path(library.file_if_there(tmp_path, "nothing.json")).read_text() == "{}"
