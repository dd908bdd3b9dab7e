"""Transformers names that differ between releases, and the private Transformers names that this package uses.

Private names of Transformers are read in this module only. `HOOKS` lists the private methods that model classes
override or call on their parent.
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


# Releases that the whole test suite runs with. Keep setup.cfg, constraints.txt, `.ci/run` and the README in line.
TESTED = ("5.15.0", "5.23.0", "5.24.0")

# Release 5.24 names the KV cache `cache` in keywords, `model_kwargs` and outputs. Earlier releases name it
# `past_key_values`, which still works with a warning up to 5.40 (in `generate` up to 6.0).
CACHE_NAMES = ("cache", "past_key_values")
CACHE = "cache" if "cache" in {field.name for field in fields(Seq2SeqLMOutput)} else "past_key_values"

# The module whose hooks stay on the blocks permanently once hidden states were requested, as training does.
RECORDERS = "transformers.utils.output_capturing"

# Private methods that our model classes override or call on their parent; they have no public counterpart. For each
# method, the parameters that our code relies on; those in `*` or `**` are passed through.
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
        ValueError: Both names have a cache.
    """
    given = [name for name in CACHE_NAMES if keywords.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"`{given[0]}` and `{given[1]}` are two names of one argument: pass one of them.")
    renamed = {name: value for name, value in keywords.items() if name not in CACHE_NAMES}
    return renamed | {CACHE: keywords[given[0]]} if given else renamed


class OutputCache:
    """Gives outputs the attribute `cache` where the installed release only has `past_key_values`.

    On newer releases, the library itself provides `past_key_values` on outputs, with its own warning.
    """

    if CACHE != "cache":

        @property
        def cache(self):
            return self.past_key_values


def attention_of(config: PreTrainedConfig) -> str:
    """The attention implementation used by the modules of this config."""
    return config._attn_implementation


def set_attention_of(config: PreTrainedConfig, implementation: str) -> None:
    """Change the attention implementation of the modules of this config only.

    `set_attn_implementation` of a model changes all its parts.
    """
    config._attn_implementation = implementation


def loads_without(*names: str) -> Callable[[type[PreTrainedModel]], type[PreTrainedModel]]:
    """Class decorator: silently ignore weights of these names in a checkpoint."""

    def extended(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
        known = model_class._keys_to_ignore_on_load_unexpected or ()
        model_class._keys_to_ignore_on_load_unexpected = [*known, *names]
        return model_class

    return extended


def keep_generation_settings(config: GenerationConfig) -> None:
    """Keep Transformers from rebuilding a generation config from the model config, which drops exit settings."""
    config._from_model_config = False


def usual_generation_values(config: GenerationConfig) -> dict[str, Any]:
    """The defaults that Transformers uses where a generation config has no value."""
    return config._get_default_generation_params()


def pad_token(config: GenerationConfig, device: torch.device) -> torch.Tensor:
    """The token that fills a row after its end, for a generation config that `generate` has prepared.

    Without a pad token this is the first EOS token, which `pad_token_id` does not show.
    """
    return config._pad_token_tensor.to(device)


def file_if_there(path: str | os.PathLike, name: str, **hub: Any) -> str | None:
    """The path of a file in a folder or Hub repository; None if it is missing there.

    Args:
        hub: Keywords of `from_pretrained` about the Hub.

    Raises:
        OSError: The repository cannot be reached.
    """
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
