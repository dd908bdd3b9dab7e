"""What `generate` does not support together with exits, each with a remedy.

Without early exit the library handles the same calls, so most functions here only list problems and the caller
decides. Measurements also refuse a model in training mode.
"""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from hf_earlyexit.common.library import CACHE, attention_of
from hf_earlyexit.decoding.cache import EarlyExitCache
from hf_earlyexit.kernels import attention


MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)


def refuse_training_mode(model: PreTrainedModel) -> None:
    """Refuse to measure a model in training mode, where dropout is active.

    Raises:
        ValueError: The model is in training mode.
    """
    if model.training:
        raise ValueError("`model` is in training mode, where dropout is active: call `model.eval()`.")


def refuse(problems: list[str]) -> None:
    """Refuse a call that has problems.

    Raises:
        ValueError: There are problems; the message lists them all.
    """
    if problems:
        raise ValueError(f"Early exit does not go with {'; '.join(problems)}. Or pass `early_exit=False`.")


def around_the_hooks(call: dict[str, Any]) -> list[str]:
    """Arguments of `generate` with which the library would bypass the mixin's hooks, each with a remedy."""
    problems = []
    if call.get("custom_generate") is not None:
        problems.append("`custom_generate`, which brings its own loop: leave it out")
    if call.get("assistant_model") is not None:
        problems.append("`assistant_model` (assisted generation): leave it out")
    if call.get("synced_gpus"):
        problems.append("`synced_gpus=True`, since ranks would exit after different layers: leave it out")
    if call.get("negative_prompt_ids") is not None:
        problems.append("`negative_prompt_ids` (classifier-free guidance): leave it out")
    if call.get("cache_implementation") == "paged":
        problems.append('`cache_implementation="paged"` (continuous batching): leave it out')
    return problems


def not_supported(model, config: GenerationConfig, model_kwargs: dict[str, Any]) -> list[str]:
    """What in a prepared call the decoder walk does not support, each with a remedy.

    Such a call is refused, or without early exit left to the library.
    """
    problems = []
    cache = model_kwargs.get(CACHE)
    if model_kwargs.get("decoder_inputs_embeds") is not None:
        problems.append("`decoder_inputs_embeds`: pass `decoder_input_ids`")
    if config.use_cache is False:
        problems.append("`use_cache=False`: leave it out")
    if cache is not None and not isinstance(cache, EarlyExitCache):
        problems.append(f"`{CACHE}` of type {type(cache).__name__}: leave it out, or pass an `EarlyExitCache`")
    if config.cache_implementation not in (None, "static"):
        problems.append(f'`cache_implementation={config.cache_implementation!r}`: use "static", or leave it out')
    if config.compile_config is not None and config.cache_implementation is None:
        problems.append('`compile_config` alone: add `cache_implementation="static"`, or leave it out')
    if getattr(config.compile_config, "dynamic", None) is not None:
        problems.append(f"`compile_config` with dynamic={config.compile_config.dynamic}: leave it out")
    if config.prefill_chunk_size is not None:
        problems.append(f"`prefill_chunk_size={config.prefill_chunk_size}`: leave it out")
    if config.guidance_scale not in (None, 1):
        problems.append(f"`guidance_scale={config.guidance_scale}`: leave it out")
    if config.output_attentions:
        problems.append("`output_attentions=True`, since skipped layers have none: leave it out")
    if config.output_hidden_states:
        problems.append("`output_hidden_states=True`, since skipped layers have none: leave it out")
    if (mode := config.get_generation_mode()) not in MODES:
        problems.append(f"generation mode {mode.value!r}: use greedy search, sampling or beams")
    if config.is_assistant:
        problems.append("being the assistant of another model: use it on its own")
    if model.training:
        problems.append("training mode: call `model.eval()`")
    decoder_config = getattr(model.decoder, "config", None)  # a wrapped decoder has none
    if decoder_config is not None and not attention_of(decoder_config).startswith(attention.PREFIX):
        problems.append(f"`attn_implementation={attention_of(model.config)!r}`: use 'sdpa' or 'eager'")
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        problems.append("a model spread over several devices by `device_map`: put it on one")
    return problems + model.passed_by(model)
