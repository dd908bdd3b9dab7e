"""Answers for when a model has a prepared copy of its decoder's weights, and when that copy must go.

The copy is never part of the model's state: it is not in `state_dict`, not saved and not copied along. It knows no
family: what a copy holds is the family's affair (`t5_prepared.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hf_earlyexit import graphs
from hf_earlyexit.cache import EarlyExitCache
from hf_earlyexit.compiling import CompileOptions
from hf_earlyexit.fingerprint import WeightsMarks, same_sums, weights_marks, weights_sums
from hf_earlyexit.layers import Decoder


class PreparedCopy(NamedTuple):
    """Packed weights and what they were made from.

    Attributes:
        weights: What a family's `prepare_weights` has made.
        marks: Of the model's weights before that.
        sums: Of these weights, to be compared after optimizer steps, which may have been another model's.
        originals: These weights, kept so that no others come to lie where they do.
        structure: Modules and settings that decide what the model's decoder computes.
    """

    weights: Any
    marks: WeightsMarks
    sums: list[torch.Tensor]
    originals: tuple
    structure: tuple


class PreparedMixin:
    """`prepare_for_generation`, for a class with adapters, `prepare_weights`, `refuse_unless_plain`, `refuse_hooks`
    and `structure_of`."""

    decoder_adapter: Callable[..., Decoder]
    prepared_adapter: Callable[..., Decoder]
    compiled_adapter: Callable[..., Decoder]
    graphed_adapter: Callable[..., Decoder]
    prepare_weights: Callable
    refuse_unless_plain: Callable
    refuse_hooks: Callable
    refuse_unrecordable: Callable
    structure_of: Callable[..., tuple]
    _prepared_copy: PreparedCopy | None = None

    def prepare_for_generation(self):
        """Copy the decoder's weights into a layout that decoding is faster with; `generate` uses it from now on.

        On a CPU in fp32 or bf16, weights are read about twice as fast when a few rows are decoded. It takes a moment,
        and memory for one more decoder and LM head, with keys' and values' maps twice; with `fill="eager"` also for
        those of all layers above each layer left. Tokens are the same up to rounding. The copy is dropped by training
        mode, `.to(...)`, `save_pretrained` and `unprepare`, and, with a warning, by the next `generate` after weights
        were changed, by a fused optimizer, too, hooks added, or modules, a `forward` or settings replaced. Not noticed
        is what is written through `.data` outside of optimizers, or to weights that were made under
        `torch.inference_mode`: call this again.

        Returns:
            The model.

        Raises:
            ValueError: The model is in training mode, or its decoder is not plain (LoRA, quantised, hooks, other
                modules or a `forward` in place of the library's, fp16, parts of different dtypes).
        """
        if self.training:
            raise ValueError("`prepare_for_generation` needs eval mode: call `model.eval()` first.")
        self.refuse_unless_plain(self)
        before = weights_marks(self), weights_sums(self), tuple(self.parameters()), self.structure_of(self)
        self._prepared_copy = PreparedCopy(self.prepare_weights(self), *before)
        return self

    def unprepare(self) -> None:
        """Drop the copy, if there is one; `generate` uses the library's blocks again."""
        self._prepared_copy = None

    @property
    def is_prepared(self) -> bool:
        """Whether there is a copy that `generate` would use."""
        return self._prepared_copy is not None

    def has_fresh_copy(self) -> bool:
        """Whether there is a copy of the model as it is, so that `generate` will use it."""
        copy = self._prepared_copy
        return copy is not None and self._changed_since(copy) is None

    def _new_decoder(
        self,
        copy: PreparedCopy | None,
        cache: EarlyExitCache,
        masks: tuple[Any, Any] = (None, None),
        compiling: CompileOptions | None = None,
        capacity: int | None = None,
    ) -> Decoder:
        """The adapter for one `generate` call, on the copy if there is one.

        Args:
            masks: Of the encoder and of the decoder prompt.
            capacity: Positions that the call needs; as many as the cache has room for if None.
        """
        if copy is None:
            return self.decoder_adapter(self, cache, *masks)
        if compiling is None:
            return self.prepared_adapter(copy.weights, self, cache, *masks)
        if self._records_graphs(compiling):
            self.graphed_adapter.lend(copy.weights, self, cache, capacity or cache.capacity)
            return self.graphed_adapter(copy.weights, compiling, self, cache, *masks)
        return self.compiled_adapter(copy.weights, compiling, self, cache, *masks)

    def _records_graphs(self, compiling: CompileOptions | None) -> bool:
        """Whether a call with these options decodes with recorded graphs."""
        return compiling is not None and graphs.are_recorded_on(self.device)

    def _copy_for_call(self, needed: bool) -> PreparedCopy | None:
        """Before a call does any work: the copy it is to use. One of other weights is dropped; where one is `needed`
        there is one.

        Raises:
            ValueError: It is needed and the decoder cannot be prepared.
        """
        copy = self._prepared_copy
        if copy is not None and (change := self._changed_since(copy)):
            if not needed:
                message = f"{change} since `prepare_for_generation`, so its copy is dropped: call it again."
                warnings.warn(message, stacklevel=5)
            self.unprepare()
            copy = None
        return self.prepare_for_generation()._prepared_copy if needed and copy is None else copy

    def _changed_since(self, copy: PreparedCopy) -> str | None:
        """What makes the copy say something else than the model."""
        marks = weights_marks(self)
        if copy.marks.tensors != marks.tensors:
            return "Weights have changed"
        if copy.marks.steps != marks.steps:
            if not same_sums(copy.sums, weights_sums(self)):
                return "Weights have changed"
            if self._prepared_copy is copy:  # not dropped meanwhile by another thread
                self._prepared_copy = copy._replace(marks=marks)  # the steps were another model's
        try:
            self.refuse_hooks(self)
        except ValueError:
            return "Hooks were added"
        if copy.structure != self.structure_of(self):
            return "Modules or settings of the decoder have changed"
        return None

    # --- what drops it ----------------------------------------------------------------------------------------------

    def train(self, mode: bool = True):
        if mode:
            self.unprepare()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self.unprepare()
        return super()._apply(*args, **kwargs)

    def save_pretrained(self, *args, **kwargs) -> None:
        self.unprepare()
        super().save_pretrained(*args, **kwargs)

    def __copy__(self):
        alias = type(self).__new__(type(self))  # shares all weights, so the copy of them serves it, too
        alias.__dict__.update(self.__dict__)
        return alias

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_prepared_copy"}
