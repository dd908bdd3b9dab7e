"""Names of transformers that differ between releases, and its private names that this package cannot do without.

A private name of transformers is read in this module and nowhere else. The
methods that a model class overrides or calls as its parent's are listed in `HOOKS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import cached_file


# Releases that the whole suite is run with; setup.cfg, constraints.txt, `.ci/run` and the README follow.
TESTED = ("5.15.0", "5.23.0", "5.24.0")

# 5.24 calls the keys and values of earlier tokens `cache`, in keywords, `model_kwargs` and outputs. Before that, and
# with a warning up to 5.40 (in `generate` up to 6.0), the name is `past_key_values`.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = "cache" if "cache" in {field.name for field in fields(Seq2SeqLMOutput)} else "past_key_values"

# The module whose hooks stay on the blocks for good once hidden states were asked for, as training does.
RECORDERS = "transformers.utils.output_capturing"

# Private methods that our model classes override, or call as their parent's: they have no public counterpart. By
# method, the parameters that our code relies on; those behind `*` or `**` are handed on.
HOOKS = {
    "_init_weights": ("module",),
    "_prepare_generation_config": ("generation_config",),
    "_prepare_cache_for_generation": (
        "generation_config",
        "model_kwargs",
        "generation_mode",
        "batch_size",
        "max_cache_length",
    ),
    "_get_stopping_criteria": ("generation_config",),
    "_valid_auto_compile_criteria": ("model_kwargs", "generation_config"),
    "_sample": (
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
        "synced_gpus",
        "streamer",
    ),
    "_beam_search": ("input_ids", "logits_processor", "stopping_criteria", "generation_config"),
    "_upload_modified_files": ("working_dir",),
}


def with_cache_name(keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `generate` or `forward` with the cache under the name that the installed release uses.

    Raises:
        ValueError: There is a cache under either name.
    """
    given = [name for name in CACHE_NAMES if keywords.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"`{given[0]}` and `{given[1]}` are two names of one argument: pass one of them.")
    renamed = {name: value for name, value in keywords.items() if name not in CACHE_NAMES}
    return renamed | {CACHE: keywords[given[0]]} if given else renamed


class OutputCache:
    """The cache of an output by the newest name, `cache`, where the installed release knows the old one only.

    The other way round, `past_key_values` of an output is the library's own, with its own warning.
    """

    if CACHE != "cache":

        @property
        def cache(self):
            return self.past_key_values


def attention_of(config: PreTrainedConfig) -> str:
    """The attention implementation that the modules of this config use."""
    return config._attn_implementation


def set_attention_of(config: PreTrainedConfig, implementation: str) -> None:
    """Change the attention implementation of the modules of this config, and of no other part of the model.

    `set_attn_implementation` of a model changes all its parts.
    """
    config._attn_implementation = implementation


def loads_without(*names: str) -> Callable[[type[PreTrainedModel]], type[PreTrainedModel]]:
    """Class decorator: weights of these names that a checkpoint has are left out, and no warning says so."""

    def extended(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
        known = model_class._keys_to_ignore_on_load_unexpected or ()
        model_class._keys_to_ignore_on_load_unexpected = [*known, *names]
        return model_class

    return extended


def keep_generation_settings(config: GenerationConfig) -> None:
    """Keep the library from rebuilding a generation config from the model's config, which drops exit settings."""
    config._from_model_config = False


def usual_generation_values(config: GenerationConfig) -> dict[str, Any]:
    """What the library fills in where a generation config says nothing."""
    return config._get_default_generation_params()


def pad_token(config: GenerationConfig, device: torch.device) -> torch.Tensor:
    """The token that follows the end of a row, of a generation config that `generate` has prepared.

    Without a pad token that is the first end token, which `pad_token_id` does not say.
    """
    return config._pad_token_tensor.to(device)


def file_if_there(path: str | os.PathLike, name: str, **hub: Any) -> str | None:
    """The path of a file of a folder or Hub repository; None if that lacks it.

    Args:
        hub: Keywords of `from_pretrained` about the Hub.

    Raises:
        OSError: The repository cannot be reached.
    """
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
