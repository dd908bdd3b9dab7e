"""The T5 model classes: stock classes with exit heads, whose `generate` uses the decoder walk."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
)
from transformers.modeling_outputs import Seq2SeqLMOutput

from hf_earlyexit.common.library import (
    CACHE,
    attention_of,
    keep_generation_settings,
    loads_without,
    set_attention_of,
    with_cache_name,
)
from hf_earlyexit.decoding.cache import EarlyExitCache
from hf_earlyexit.decoding.layers import decode_step
from hf_earlyexit.exits.config import EarlyExitConfig
from hf_earlyexit.exits.heads import ExitHeads, initialize
from hf_earlyexit.families.t5.compiled import CompiledT5Decoder
from hf_earlyexit.families.t5.configuration import EarlyExitT5Config, early_exit_config
from hf_earlyexit.families.t5.decoder import T5Decoder
from hf_earlyexit.families.t5.graphs import GraphedT5Decoder, refuse_unrecordable
from hf_earlyexit.families.t5.prepared import PreparedT5, PreparedT5Decoder, refuse_hooks, refuse_unless_plain
from hf_earlyexit.families.t5.stock import stock_of
from hf_earlyexit.families.t5.structure import passed_by, structure_of
from hf_earlyexit.generation.mixin import EarlyExitGenerationMixin
from hf_earlyexit.generation.teacher_forced import TeacherForcedExits
from hf_earlyexit.kernels import attention


class EarlyExitT5ForConditionalGeneration(EarlyExitGenerationMixin, T5ForConditionalGeneration):
    """T5 whose tokens may exit the decoder early.

    Backbone, weight names and all plain outputs are those of stock T5; exit heads are added. Decoders deeper than the
    encoder are supported in `generate`. `forward` is stock T5's unless it gets an `EarlyExitCache` (from `generate`)
    or an `exit_objective`.
    """

    config_class = EarlyExitT5Config
    decoder_adapter = T5Decoder
    prepared_adapter = PreparedT5Decoder
    compiled_adapter = CompiledT5Decoder
    graphed_adapter = GraphedT5Decoder
    prepare_weights = PreparedT5
    refuse_unless_plain = staticmethod(refuse_unless_plain)
    refuse_hooks = staticmethod(refuse_hooks)
    refuse_unrecordable = staticmethod(refuse_unrecordable)
    structure_of = staticmethod(structure_of)
    passed_by = staticmethod(passed_by)
    # T5 accepts `num_items_in_batch` and ignores it. A `Trainer` that assumes it is used does not divide the losses of
    # accumulated batches by their number.
    accepts_loss_kwargs = False

    def __init__(self, config: EarlyExitT5Config):
        if not isinstance(config, EarlyExitT5Config):
            raise ValueError(f"`config` must be an `EarlyExitT5Config`, got `{type(config).__name__}`.")
        super().__init__(config)
        early_exit = EarlyExitConfig.from_dict(config.early_exit).for_layers(config.num_decoder_layers)
        config.early_exit = early_exit.to_dict()
        self.exit_heads = ExitHeads(early_exit, config.d_model, config.layer_norm_epsilon)
        self.post_init()
        self._attend_for_live_rows()
        # Otherwise `save_pretrained` would write exit settings of `generation_config` and reloading would drop them.
        keep_generation_settings(self.generation_config)

    @property
    def early_exit(self) -> EarlyExitConfig:
        """The exit configuration with all values filled in; `config.early_exit` holds the same as plain values."""
        return EarlyExitConfig.from_dict(self.config.early_exit)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not initialize(module):
            super()._init_weights(module)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args,
        early_exit: EarlyExitConfig | dict | None = None,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """Load an early-exit checkpoint, or convert any plain T5 (v1.0, v1.1, Flan).

        Args:
            pretrained_model_name_or_path: A folder or a Hub id.
            early_exit: The exit points. None: the checkpoint's own, or `EarlyExitConfig()` for a plain T5.
            config: A `T5Config` or `EarlyExitT5Config`, or a path to one, in place of the checkpoint's. It is not
                modified.
            kwargs: As for `T5ForConditionalGeneration.from_pretrained`. A `quantization_config` is not applied to exit
                heads, since exit decisions depend on small differences.

        Heads that the checkpoint lacks start as the logit lens; nothing else may be missing.

        Raises:
            ValueError: The checkpoint is of another family, `early_exit` does not fit the decoder, or heads that the
                checkpoint lacks would be offloaded.
        """
        config, kwargs = early_exit_config(pretrained_model_name_or_path, config, kwargs)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = without_heads(kwargs["quantization_config"])
        as_stored = early_exit is None
        early_exit = EarlyExitConfig.from_dict(config.early_exit if early_exit is None else early_exit)
        config.early_exit = early_exit.for_layers(config.num_decoder_layers).to_dict()
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
        )
        new = sorted(key for key in info["missing_keys"] if key.startswith("exit_heads."))
        if lost := [key for key in new if model.get_parameter(key).is_meta]:
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} lacks `{lost[0]}`, which cannot be initialised "
                "while offloaded to disk: load without offloading, `save_pretrained`, and offload that."
            )
        missing = {key.removeprefix("exit_heads.") for key in new}
        model.exit_heads.start_as_logit_lens(model.decoder.final_layer_norm, missing)
        if any(name.startswith("classifiers.") for name in missing):
            model.config.early_exit["classifier"]["trained"] = False
        keep_generation_settings(model.generation_config)
        model._load_seen_inputs(pretrained_model_name_or_path, kwargs)
        model._load_certificate(pretrained_model_name_or_path, as_stored and not missing, kwargs)
        return (model, info) if output_loading_info else model

    def save_stock(self, save_directory: str | os.PathLike) -> None:
        """Save the full-depth model as a plain `t5` checkpoint, without exits and exit settings.

        For tools that support only stock T5, such as CTranslate2's converter. Save the tokenizer separately.
        """
        stock = stock_of(self)
        self.seen_inputs.name_in(stock.config)
        stock.save_pretrained(save_directory)
        if self.seen_inputs:
            self.seen_inputs.save(save_directory)

    def exit_head_input(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The LM head's input for a token that exits after `layer`.

        Args:
            layer: Layers run.
            hidden: `[..., hidden]`, the output of block `layer`.
        """
        head = self.exit_heads.head_of(layer, self.decoder.final_layer_norm)
        return head(hidden) * (self.model_dim**-0.5 if self.config.scale_decoder_outputs else 1.0)

    @functools.wraps(T5ForConditionalGeneration.forward)
    def forward(self, *args, exit_objective: Callable[[TeacherForcedExits], torch.Tensor] | None = None, **kwargs):
        """Stock T5's `forward`, unless given an `EarlyExitCache` (by `generate`) or an `exit_objective` (by training).

        Args:
            exit_objective: Receives the teacher-forced outputs of every exit point, with all layers run, and returns
                the output's `loss`. Needs `labels`.
        """
        if exit_objective is not None:
            return Seq2SeqLMOutput(loss=exit_objective(self._labelled_exits(**kwargs)))
        kwargs = with_cache_name(kwargs)
        cache = kwargs.get(CACHE)
        if not isinstance(cache, EarlyExitCache):
            return super().forward(*args, **kwargs)
        if "exit_run" not in kwargs:
            raise ValueError("An `EarlyExitCache` belongs to a `generate` call: pass it to `model.generate(...)`.")
        logits = decode_step(kwargs["exit_decoder"], kwargs["decoder_input_ids"], cache, kwargs["exit_run"])
        return Seq2SeqLMOutput(logits=logits, **{CACHE: cache})

    def _labelled_exits(self, labels: torch.Tensor | None = None, **kwargs) -> TeacherForcedExits:
        if labels is None:
            raise ValueError("`exit_objective` needs `labels`, got None.")
        if kwargs.get("decoder_input_ids") is None:
            kwargs["decoder_input_ids"] = self.prepare_decoder_input_ids_from_labels(labels)
        output = super().forward(**kwargs, output_hidden_states=True, use_cache=False)
        score = lambda layer, hidden: self.lm_head(self.exit_head_input(layer, hidden))  # noqa: E731
        layers, classify = self.early_exit.exit_layers, self.exit_heads.exit_logits
        normalize = self.decoder.final_layer_norm
        states = output.decoder_hidden_states
        return TeacherForcedExits(layers, states, output.logits, labels, score, classify, normalize)

    def set_attn_implementation(self, *args, **kwargs) -> None:
        super().set_attn_implementation(*args, **kwargs)
        for stack in (self.encoder, self.decoder):  # transformers 5.15 changes the model's own config alone
            set_attention_of(stack.config, attention_of(self.config))
        self._attend_for_live_rows()

    def _attend_for_live_rows(self) -> None:
        """Switch the decoder to the registered attention that accepts `live_rows`, if it uses sdpa or eager."""
        implementation = attention_of(self.decoder.config)
        if implementation in ("sdpa", "eager"):
            set_attention_of(self.decoder.config, attention.PREFIX + implementation)


def without_heads(quantization_config):
    """A copy of the quantization config that also excludes exit heads, besides the library's default exclusions."""
    config = copy.deepcopy(quantization_config)
    values = config if isinstance(config, dict) else vars(config)
    for name in ("modules_to_not_convert", "llm_int8_skip_modules"):
        if name in values:
            chosen = ["lm_head", "shared"] if values[name] is None else values[name]
            values[name] = [*chosen, "exit_heads"]
    return config


@loads_without("exit_heads", "lm_head")
class EarlyExitT5Model(T5Model):
    """The stock `T5Model` of an early-exit checkpoint: without LM head and exits, so every layer runs."""

    config_class = EarlyExitT5Config


@loads_without("exit_heads", "lm_head")
class EarlyExitT5EncoderModel(T5EncoderModel):
    """The stock `T5EncoderModel` of an early-exit checkpoint."""

    config_class = EarlyExitT5Config


AutoConfig.register("early_exit_t5", EarlyExitT5Config)
AutoModel.register(EarlyExitT5Config, EarlyExitT5Model)
AutoModelForTextEncoding.register(EarlyExitT5Config, EarlyExitT5EncoderModel)
AutoModelForSeq2SeqLM.register(EarlyExitT5Config, EarlyExitT5ForConditionalGeneration)
