"""Answers for when a model has a prepared copy of its decoder's weights, and when that copy must go.

The copy is never part of the model's state: it is not in `state_dict`, not saved and not copied along. It knows no
family: what a copy holds is the family's affair (`t5_prepared.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from hf_earlyexit.cache import EarlyExitCache
from hf_earlyexit.compiling import CompileOptions
from hf_earlyexit.fingerprint import weights_marks
from hf_earlyexit.layers import Decoder


class PreparedCopy(NamedTuple):
    """A copy, and the marks of the weights it was made of."""

    weights: Any
    marks: tuple


class PreparedMixin:
    """`prepare_for_generation`, for a class that has `decoder_adapter`, `prepared_adapter` and `prepare_weights`."""

    decoder_adapter: Callable[..., Decoder]
    prepared_adapter: Callable[..., Decoder]
    compiled_adapter: Callable[..., Decoder]
    prepare_weights: Callable
    _prepared_copy: PreparedCopy | None = None

    def prepare_for_generation(self):
        """Copy the decoder's weights into a layout that decoding is faster with; `generate` uses it from now on.

        On a CPU in fp32 or bf16, weights are read about twice as fast when a few rows are decoded. It takes memory for
        one more decoder and LM head, and a moment. Tokens are the same up to rounding. The copy is dropped by training
        mode, `.to(...)`, `save_pretrained` and `unprepare`, and, with a warning, when weights were changed.

        Returns:
            The model.

        Raises:
            ValueError: The model is in training mode, or its decoder is not plain (LoRA, quantised, hooks, fp16).
        """
        if self.training:
            raise ValueError("`prepare_for_generation` needs eval mode: call `model.eval()` first.")
        self._prepared_copy = PreparedCopy(self.prepare_weights(self), weights_marks(self))
        return self

    def unprepare(self) -> None:
        """Drop the copy, if there is one; `generate` uses the library's blocks again."""
        self._prepared_copy = None

    @property
    def is_prepared(self) -> bool:
        """Whether there is a copy that `generate` would use."""
        return self._prepared_copy is not None

    def _new_decoder(
        self, cache: EarlyExitCache, encoder_mask, decoder_mask, compiling: CompileOptions | None = None
    ) -> Decoder:
        """The adapter for one `generate` call, on the copy if there is one."""
        copy = self._prepared_copy
        if copy is None:
            return self.decoder_adapter(self, cache, encoder_mask, decoder_mask)
        if compiling is None:
            return self.prepared_adapter(copy.weights, self, cache, encoder_mask, decoder_mask)
        return self.compiled_adapter(copy.weights, compiling, self, cache, encoder_mask, decoder_mask)

    def _freshen_copy(self, needed: bool) -> None:
        """Before a call does any work: drop a copy of other weights, and make one where it is `needed`.

        Raises:
            ValueError: It is needed and the decoder cannot be prepared.
        """
        copy = self._prepared_copy
        if copy is not None and copy.marks != weights_marks(self):
            if not needed:
                message = "Weights have changed since `prepare_for_generation`, so its copy is dropped: call it again."
                warnings.warn(message, stacklevel=5)
            self.unprepare()
        if needed and not self.is_prepared:
            self.prepare_for_generation()

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
        return {name: value for name, value in self.__dict__.items() if name != "_prepared_copy"}
