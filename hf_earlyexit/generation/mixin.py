"""The `generate` drop-in: reads the exit settings, refuses unsupported calls and hands over to the library.

Beam search, streamers, processors, scores and stopping are the library's; its beam loop gets an `EarlyExitCache` and a
run. Greedy search and sampling use the token loop (`decoding/token_loop.py`). The run's records are added to the
output. This module depends on an encoder-decoder model only as far as the library's loops do; the family's adapter
handles its internals.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    StoppingCriteriaList,
)
from transformers.generation import (
    GenerateBeamEncoderDecoderOutput,
    GenerateEncoderDecoderOutput,
)

from hf_earlyexit.common.library import CACHE, OutputCache, with_cache_name
from hf_earlyexit.decoding.cache import EarlyExitCache
from hf_earlyexit.decoding.layers import segments
from hf_earlyexit.decoding.recorded_run import RecordedRun
from hf_earlyexit.decoding.run import ExitRun, RecordingStoppingCriteria
from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.decoding.token_loop import generate_tokens
from hf_earlyexit.exits.criteria import ExitCriterion
from hf_earlyexit.generation.certified import CertifiedMixin
from hf_earlyexit.generation.prepared import PreparedMixin
from hf_earlyexit.generation.refusals import around_the_hooks, not_supported, refuse
from hf_earlyexit.kernels.compiling import CompileOptions, static_capacity


_NOT_GIVEN: Any = object()


@dataclass
class EarlyExitGenerateOutput(OutputCache, GenerateEncoderDecoderOutput):
    """Output of `generate` with the depth of each token and the work done. T = new tokens of `sequences`.

    All tensors below are on the CPU.

    Attributes:
        layers_run: `[batch, T]`, the number of layers that each new token ran, 1 to L; 0 where the row had finished.
        exit_confidences: `[batch, T]`, fp32, the confidence with which each token exited; NaN where it ran all layers.
        layer_rows: `[L]`, rows x positions that entered each block, counted at the call of the block.
        filled_positions: `[L]`, skipped positions whose missing keys and values were projected.
        head_rows: `[L + 1]`, rows that were scored by the full vocabulary head after each layer; entry 0 is always 0.
        candidate_rows: `[L + 1]`, rows of the head's weights that were scored in addition after each layer: rows of
            the batch x their candidates (`exit_candidates`).
        asked_confidences: With `record_exits`: `[batch, T, L - 1]`, the confidence at each exit point; NaN where the
            exit was not evaluated.
        asked_agreements: With `record_exits`: `[batch, T, L - 1]`, for tokens that ran all layers, whether the exit's
            argmax token is the last layer's, 1 or 0. NaN for tokens that exited, whose full-depth choice is unknown.
    """

    layers_run: torch.LongTensor | None = None
    exit_confidences: torch.FloatTensor | None = None
    layer_rows: torch.LongTensor | None = None
    filled_positions: torch.LongTensor | None = None
    head_rows: torch.LongTensor | None = None
    candidate_rows: torch.LongTensor | None = None
    asked_confidences: torch.FloatTensor | None = None
    asked_agreements: torch.FloatTensor | None = None


@dataclass
class EarlyExitGenerateBeamOutput(OutputCache, GenerateBeamEncoderDecoderOutput):
    """`EarlyExitGenerateOutput` for beam search: values per token follow the returned hypotheses."""

    layers_run: torch.LongTensor | None = None
    exit_confidences: torch.FloatTensor | None = None
    layer_rows: torch.LongTensor | None = None
    filled_positions: torch.LongTensor | None = None
    head_rows: torch.LongTensor | None = None
    candidate_rows: torch.LongTensor | None = None
    asked_confidences: torch.FloatTensor | None = None
    asked_agreements: torch.FloatTensor | None = None


class EarlyExitGenerationMixin(CertifiedMixin, PreparedMixin):
    """`generate` with exits, for a class that has `early_exit`, `exit_heads`, `passed_by` and what `PreparedMixin`
    requires."""

    passed_by: Callable[..., list[str]]

    def generate(
        self,
        *args,
        early_exit: bool | None = None,
        exit_criterion=None,
        exit_threshold: float | None = _NOT_GIVEN,
        exit_schedule=None,
        exit_layer: int | None = None,
        exit_layers: Sequence[int] | None = None,
        exit_candidates: int | None = None,
        batch_exit: str | None = None,
        fill: str | None = None,
        strict_certificate: bool | None = None,
        record_exits: bool | None = None,
        **kwargs,
    ):
        """Generate as the library does; each token exits the decoder once its confidence reaches the threshold.

        Settings that are not given are read from `generation_config`; without a criterion there, every token runs all
        layers.

        A criterion evaluates the raw scores of the head. Logits processors (penalties, banned words, grammars,
        temperature) run after the exit. If a processor forbids the token that was most likely at the exit, the next
        best token of the exit layer is generated.

        Args:
            early_exit: False: every token runs all layers, regardless of other settings.
            exit_criterion: `"softmax"`, `"max_prob"`, `"entropy"`, `"state"`, `"classifier"`, `"patience"`, `"fixed"`,
                an object with `confidence(point) -> [rows]` (see `hf_earlyexit.exits.criteria`), or the plain values
                of an `ExitAccuracy` (its `to_dict()`), which can be stored.
            exit_threshold: A token exits when its confidence is at least this. In [0, 1]; None: never. 1 does not mean
                never: a saturated softmax has a confidence of exactly 1. At 0 every token exits at the first exit
                point.
            exit_schedule: `"constant"`, `"calm"` (the paper's decay), `"calm_released"` (its code's), or
                `{"name": ..., "tau": ...}`.
            exit_layer: With `"fixed"`, the layer after which every token exits.
            exit_layers: The model's exit points that are evaluated in this call, at least one; all if not given.
            exit_candidates: With `"softmax"`, `"max_prob"`, `"entropy"` and `"patience"`: the number of candidate
                tokens, the likeliest at a token's first exit point. Later exit points score only these. A token exits
                only if the full vocabulary head, evaluated where the candidates pass, confirms its choice.
            batch_exit: `"row"`: every row exits at its own layer. `"batch"`: all rows exit where the last one has
                passed. `"batch_joint"`: all rows exit where all pass at the same layer.
            fill: `"lazy"`: keys and values of skipped layers are projected when first needed. `"eager"`: immediately.
                Default: eager with CUDA graphs, since a graph has a fixed size, otherwise lazy.
            strict_certificate: True: refuse calls that the model's certificate does not cover. Otherwise such calls
                warn, once.
            record_exits: True: the output contains the confidence of every evaluated exit for every token, and whether
                full depth agreed. With `exit_threshold=None` exits are evaluated and no token exits. Every evaluated
                exit then runs the vocabulary head.
            args, kwargs: As for the library's `generate`. A cache can be given as `cache` or as `past_key_values`,
                whichever name the installed library uses.

        Returns:
            As the library; with `return_dict_in_generate=True` an `EarlyExitGenerateOutput`.

        Raises:
            ValueError: A setting is invalid, an argument is not supported with early exit, or `strict_certificate` is
                set and the certificate does not cover the call.
        """
        given = {
            "early_exit": early_exit,
            "exit_criterion": exit_criterion,
            "exit_schedule": exit_schedule,
            "exit_layer": exit_layer,
            "exit_layers": exit_layers,
            "exit_candidates": exit_candidates,
            "batch_exit": batch_exit,
            "fill": fill,
            "strict_certificate": strict_certificate,
            "record_exits": record_exits,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if exit_threshold is not _NOT_GIVEN:
            given["exit_threshold"] = exit_threshold
        kwargs = with_cache_name(kwargs)
        call = inspect.signature(GenerationMixin.generate).bind(self, *args, **kwargs).arguments
        call = {**call, **call.get("kwargs", {})}
        settings = ExitSettings.merge(given, call.get("generation_config"), self.generation_config)
        num_layers, vocabulary = self.decoder_adapter.shape(self).num_layers, self.config.vocab_size
        settings.check_against(self.early_exit, num_layers, vocabulary)
        if problems := around_the_hooks(call):
            if settings.asks:
                refuse(problems)
            return super().generate(*args, **kwargs)
        self._hold_to_certificate(settings, call)
        return super().generate(*args, exit_settings=settings, **kwargs)

    @torch.no_grad()
    def warm_up(
        self,
        batch_size: int = 1,
        source_length: int = 64,
        max_new_tokens: int = 64,
        exit_layers: Sequence[int] | None = None,
        early_exit: bool = True,
        compile_config: CompileConfig | None = None,
        disable_compile: bool = False,
        exit_criterion: str | ExitCriterion | None = None,
    ) -> None:
        """Compile what `generate(cache_implementation="static")` needs, so that later calls do not wait for it.

        On CUDA, graphs are recorded as well: those recorded for a number of rows serve batches up to the next power of
        two.

        Prepares the model (`prepare_for_generation`). Compiled code also serves other lengths and batch sizes. A batch
        of one needs graphs of its own, and so does the model after it is prepared again.

        Args:
            batch_size: Largest number of rows of later calls.
            source_length: Source tokens.
            max_new_tokens: New tokens of a text.
            exit_layers: Exit points of later calls, including the layer of `"fixed"`; None: those of
                `generation_config`, or all exit points of the model.
            early_exit: False: no exits are evaluated in later calls.
            compile_config: As later given to `generate`.
            disable_compile: As later given to `generate`. On CUDA, graphs are still recorded, with torch's own
                kernels.
            exit_criterion: As later given to `generate`; None: that of `generation_config`. Graphs evaluate it.

        Raises:
            ValueError: The decoder cannot be prepared, or the model has no such exit layer or criterion.
        """
        options = {"compile_config": compile_config, "disable_compile": disable_compile}
        config = GenerationConfig(cache_implementation="static", **options)
        exit_points = self._layers_to_ask(exit_layers) if early_exit else ()
        criterion = self._criterion_to_record(exit_criterion, exit_points)
        walk = segments(self.config.num_decoder_layers, exit_points)
        compiling = CompileOptions.of(config, self.device)
        if self._records_graphs(compiling):
            self.refuse_unrecordable(self)
        copy = self._copy_for_call(needed=True)
        states = torch.zeros(batch_size, source_length, self.config.d_model, dtype=self.dtype, device=self.device)
        fill = self._fill(ExitSettings(), compiling)
        cache = self._cache_for(None, states, static_capacity(max_new_tokens + 1), fill)
        cache.attach_encoder(states)
        decoder = self._new_decoder(copy, cache, compiling=compiling)
        if criterion is not None:
            decoder.expect(criterion, exit_points)
        for _ in tqdm(decoder.warm_up(walk, cache), desc="Compiling", unit="graph"):
            pass

    def _criterion_to_record(
        self, given: str | ExitCriterion | None, exit_points: Collection[int]
    ) -> ExitCriterion | None:
        """The given criterion, or that of the stored settings; None without exit points or for a fixed layer.

        Raises:
            ValueError: The criterion is unknown, or the model lacks what it needs.
        """
        given = self.generation_config.__dict__.get("exit_criterion") if given is None else given
        if not exit_points or given in (None, "fixed"):
            return None
        settings = ExitSettings.merge({"exit_criterion": given, "exit_threshold": 1.0}, None, None)
        settings.check_against(self.early_exit, self.config.num_decoder_layers, self.config.vocab_size)
        return settings.criterion

    def _layers_to_ask(self, exit_layers: Sequence[int] | None) -> Collection[int]:
        """The given exit layers, or those of the stored settings, or all exit points of the model.

        Raises:
            ValueError: A layer is not an exit point.
        """
        num_layers = self.config.num_decoder_layers
        if exit_layers is not None:
            given = {"exit_criterion": "state", "exit_threshold": 1.0, "exit_layers": exit_layers}
            settings = ExitSettings.merge(given, None, None)
            settings.check_against(self.early_exit, num_layers)
            return settings.exit_points(self.early_exit, num_layers)
        stored = ExitSettings.merge({}, None, self.generation_config)
        return stored.exit_points(self.early_exit, num_layers) or self.early_exit.exit_layers

    # --- hooks of the library's `generate`, in the order it calls them ----------------------------------------------

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs):
        settings: ExitSettings | None = kwargs.pop("exit_settings", None)
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if settings is not None:
            problems = not_supported(self, generation_config, model_kwargs)
            if settings.asks:
                refuse(problems)
            generation_config._exit_settings = None if problems else settings
            if not problems:
                self._choose_decoder(generation_config, settings)
        return generation_config, model_kwargs

    def _choose_decoder(self, generation_config: GenerationConfig, settings: ExitSettings) -> None:
        """Choose the implementation for a call; without early exit, the library handles what cannot be compiled here.

        Raises:
            ValueError: The call uses exits and cannot be compiled or prepared.
        """
        try:
            compiling = CompileOptions.of(generation_config, self.device)
            if self._records_graphs(compiling):
                self.refuse_unrecordable(self)
            generation_config._exit_copy = self._copy_for_call(needed=compiling is not None)
        except ValueError:
            if settings.asks:
                raise
            compiling = generation_config._exit_settings = None
        generation_config._exit_compiling = compiling

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, max_length):
        settings: ExitSettings | None = getattr(generation_config, "_exit_settings", None)
        if settings is None:
            self._give_deep_decoder_a_cache(generation_config, model_kwargs)
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_length
            )
        states = model_kwargs["encoder_outputs"][0]
        is_static = generation_config.cache_implementation == "static"
        capacity = static_capacity(max_length) if is_static else min(max_length, 128)
        compiling = generation_config._exit_compiling
        room = 1 if self._records_graphs(compiling) else capacity  # graphs have their own arena
        own: EarlyExitCache | None = model_kwargs.get(CACHE)
        cache = self._cache_for(own, states, room, self._fill(settings, compiling, own))
        cache.attach_encoder(states, rows_per_prompt=max(1, len(states) // batch_size))
        model_kwargs[CACHE] = cache
        masks = (model_kwargs.get("attention_mask"), model_kwargs.get("decoder_attention_mask"))
        decoder = self._new_decoder(generation_config._exit_copy, cache, masks, compiling, capacity)
        model_kwargs["exit_decoder"] = decoder
        model_kwargs["exit_run"] = generation_config._exit_run = (RecordedRun if settings.record_exits else ExitRun)(
            settings,
            settings.exit_points(self.early_exit, cache.num_layers),
            num_layers=cache.num_layers,
            batch_size=len(states),
            max_length=generation_config.max_length,
            device=states.device,
        )
        if settings.asks:
            decoder.expect(settings.criterion, generation_config._exit_run.exit_points)

    def _fill(
        self, settings: ExitSettings, compiling: CompileOptions | None, own: EarlyExitCache | None = None
    ) -> str:
        """The fill mode: when keys and values of skipped layers are projected."""
        if settings.fill is not None:
            return settings.fill
        if own is not None:
            return own.fill
        return "eager" if self._records_graphs(compiling) else "lazy"

    def _get_stopping_criteria(self, generation_config, *args, **kwargs) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        run: ExitRun | None = getattr(generation_config, "_exit_run", None)
        # Skip finished rows only when there is an EOS criterion and no beams; otherwise the library keeps decoding
        # them.
        ends_rows = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        if run is None or not ends_rows or generation_config.num_beams > 1:
            return criteria
        return RecordingStoppingCriteria(criteria, run)

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        # Segments are compiled separately, not `forward` as a whole.
        if "exit_run" in model_kwargs:
            return False
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ):
        call = (input_ids, logits_processor, stopping_criteria, generation_config)
        run: ExitRun | None = model_kwargs.get("exit_run")
        if run is None:
            return super()._sample(*call, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
        if synced_gpus:  # set by the library where ranks share the weights
            if run.exit_points:
                refuse(["weights that are spread over ranks, which would exit after different layers: gather them"])
            output = super()._sample(*call, synced_gpus=True, streamer=streamer, **model_kwargs)
            return _with_exits(output, run)
        # The token loop reports finished rows to the run itself.
        call = (input_ids, logits_processor, StoppingCriteriaList(stopping_criteria), generation_config)
        decoder, cache = model_kwargs["exit_decoder"], model_kwargs[CACHE]
        return _with_exits(generate_tokens(*call, decoder, cache, run, streamer), run)

    def _beam_search(self, *args, **kwargs):
        return _with_exits(super()._beam_search(*args, **kwargs), kwargs.get("exit_run"))

    def save_pretrained(self, *args, **kwargs) -> None:
        """As the library's.

        Raises:
            ValueError: `generation_config` has a criterion or schedule that is an object, which cannot be saved.
        """
        for name in ("exit_criterion", "exit_schedule"):
            value = getattr(self.generation_config, name, None)
            if value is not None and not isinstance(value, (str, dict)):
                values = "its `to_dict()`" if hasattr(value, "to_dict") else "a name or None"
                raise ValueError(
                    f"`generation_config.{name}` is an object, {value!r}, which cannot be saved: set it to {values}, "
                    "and pass the object to `generate`."
                )
        super().save_pretrained(*args, **kwargs)

    # --- for the hooks ----------------------------------------------------------------------------------------------

    def _give_deep_decoder_a_cache(self, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
        """Provide a stock cache where the library would size one by the encoder's depth, with too few layers."""
        sized_by_encoder = self.config.num_decoder_layers > self.config.num_layers
        own = model_kwargs.get(CACHE) is not None or generation_config.cache_implementation is not None
        if sized_by_encoder and not own and generation_config.use_cache is not False:
            model_kwargs[CACHE] = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def _cache_for(self, own: EarlyExitCache | None, states: torch.Tensor, capacity: int, fill: str) -> EarlyExitCache:
        """A cache for a batch with these encoder states: the user's own if given, else a new one.

        Raises:
            ValueError: The user's cache was made for another model, batch or mode, or is not empty.
        """
        decoder = self.decoder_adapter.shape(self)
        shape = (decoder.num_layers, len(states), decoder.num_heads, decoder.head_dim)
        options = {"dtype": decoder.dtype, "device": states.device, "fill": fill}
        if own is None:
            return EarlyExitCache(*shape, capacity=max(1, capacity), **options)
        if own.get_seq_length() > 0:
            raise ValueError(f"`{CACHE}` is not empty: call its `reset()`, or leave it out.")
        found = (own.num_layers, own.num_rows, own.num_heads, own.head_dim)
        if found != shape:
            raise ValueError(
                f"`{CACHE}` was made for (layers, rows, heads, head width) = "
                f"{found}, this call needs {shape}: leave it out."
            )
        for name, value in options.items():
            if getattr(own, name) != value:
                raise ValueError(f"`{CACHE}` was made with {name}={getattr(own, name)!r}, this call needs {value!r}.")
        return own


def _with_exits(output, run: ExitRun | None):
    """The library's output with the run's records added; plain sequences and calls without a run unchanged."""
    if run is None or isinstance(output, torch.Tensor):
        return output
    if isinstance(output, GenerateBeamEncoderDecoderOutput):
        cls, chosen = EarlyExitGenerateBeamOutput, output.beam_indices.cpu().long()
        said = {name: _of_beams(tensor, chosen) for name, tensor in run.per_token().items()}
    else:
        cls, new_tokens = EarlyExitGenerateOutput, output.sequences.shape[1] - run.prompt_length
        said = {name: tensor[:, :new_tokens] for name, tensor in run.per_token().items()}
    return cls(**output, **said, **run.work_by_layer())


def _of_beams(tensor: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Values per row `[batch x beams, steps, ...]`, gathered along beams `[hypotheses, steps]`; -1 is no beam."""
    found = tensor[chosen, torch.arange(chosen.shape[1])]
    found[chosen < 0] = float("nan") if found.is_floating_point() else 0
    return found
