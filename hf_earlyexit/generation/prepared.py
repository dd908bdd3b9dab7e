"""When a model has a prepared copy of its decoder's weights, and when that copy is dropped.

The copy is not part of the model's state: it is not in `state_dict`, not saved and not copied along. Independent of
model families: a family defines what its copy holds (`families/t5/prepared.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hf_earlyexit.decoding.cache import EarlyExitCache
from hf_earlyexit.decoding.layers import Decoder
from hf_earlyexit.generation.fingerprint import WeightsMarks, parameter_versions, same_sums, weights_sums
from hf_earlyexit.kernels import graphs
from hf_earlyexit.kernels.compiling import CompileOptions


class PreparedCopy(NamedTuple):
    """Packed weights, the parameter versions they were made from, and the parameters themselves.

    Attributes:
        weights: The result of the family's `prepare_weights`.
        marks: Parameter versions of the model before packing.
        sums: Bit sums of the model's weights, compared after optimizer steps, which may have been another model's.
        originals: The model's parameters, kept alive so that their addresses are not reused.
        structure: Modules and settings that determine what the model's decoder computes.
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
        """Copy the decoder's weights into a layout that decodes faster; `generate` uses the copy from now on.

        On a CPU in fp32 or bf16, weights are read about twice as fast when few rows are decoded. The call takes a
        moment and memory for one more decoder and LM head, with the key and value projections held twice;
        `fill="eager"` also needs memory for the key and value projections of all layers above each layer at which a
        row exits. Tokens are the same up to rounding.

        Training mode, `.to(...)`, `save_pretrained` and `unprepare` drop the copy. The next `generate` drops it with a
        warning if weights have changed (also by a fused optimizer), hooks were added, or modules, a `forward` or
        settings were replaced. Writes through `.data` outside of optimizers, and writes to weights made under
        `torch.inference_mode`, are not detected: call this method again after them.

        Returns:
            The model.

        Raises:
            ValueError: The model is in training mode, or its decoder is not plain (LoRA, quantised, hooks, modules or
                a `forward` other than the library's, fp16, mixed dtypes).
        """
        if self.training:
            raise ValueError("`prepare_for_generation` needs eval mode: call `model.eval()` first.")
        self.refuse_unless_plain(self)
        before = parameter_versions(self), weights_sums(self), tuple(self.parameters()), self.structure_of(self)
        self._prepared_copy = PreparedCopy(self.prepare_weights(self), *before)
        return self

    def unprepare(self) -> None:
        """Drop the copy, if any; `generate` uses the library's blocks again."""
        self._prepared_copy = None

    @property
    def is_prepared(self) -> bool:
        """Whether there is a prepared copy."""
        return self._prepared_copy is not None

    def has_fresh_copy(self) -> bool:
        """Whether there is a prepared copy that matches the model, so that `generate` will use it."""
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
            masks: Attention masks of the encoder and of the decoder prompt.
            capacity: Positions that the call needs; None: the capacity of the cache.
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
        """The copy that a call uses, determined before the call does any work.

        Drops a copy that no longer matches the model, and makes one if it is `needed`.

        Raises:
            ValueError: A copy is needed and the decoder cannot be prepared.
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
        """What has changed in the model since the copy was made; None if nothing."""
        marks = parameter_versions(self)
        if copy.marks.tensors != marks.tensors:
            return "Weights have changed"
        if copy.marks.steps != marks.steps:
            if not same_sums(copy.sums, weights_sums(self)):
                return "Weights have changed"
            if self._prepared_copy is copy:  # another thread may have dropped it
                self._prepared_copy = copy._replace(marks=marks)  # the steps were another model's
        try:
            self.refuse_hooks(self)
        except ValueError:
            return "Hooks were added"
        if copy.structure != self.structure_of(self):
            return "Modules or settings of the decoder have changed"
        return None

    # --- what drops the copy ----------------------------------------------------------------------------------------

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
        alias = type(self).__new__(type(self))  # shares all weights, so the prepared copy is valid for it, too
        alias.__dict__.update(self.__dict__)
        return alias

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_prepared_copy"}
