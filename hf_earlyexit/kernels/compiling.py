"""Compilation of segments: the options of one `generate` call for `torch.compile`.

The switch is the library's: `cache_implementation="static"`, with `compile_config` for details. Independent of models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from types import FunctionType

import torch
from transformers import GenerationConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

# CUDA graphs are recorded in `graphs.py`, so compiler modes that record their own are replaced by ones that do not.
MODES = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}

_numbers = count()

# The capacity of a static cache is a multiple of this many positions.
STEP = 64


@dataclass(frozen=True)
class CompileOptions:
    """Arguments of `torch.compile`, from the library's `CompileConfig`; `fullgraph` is always True and not stored.

    Attributes:
        backend: None: nothing is compiled, and torch's own kernels run.
    """

    backend: str | Callable | None = "inductor"
    mode: str | None = None
    options: tuple[tuple[str, str | int | bool], ...] | None = None

    @classmethod
    def of(cls, config: GenerationConfig, device: torch.device) -> CompileOptions | None:
        """The options of a prepared generation config; None if nothing is to be compiled or recorded.

        Raises:
            ValueError: `compile_config` enables the compiler's own CUDA graphs.
        """
        if config.cache_implementation != "static":
            return None
        if config.disable_compile:
            return cls(backend=None) if device.type == "cuda" else None
        given = config.compile_config
        if given is None:
            return cls.usual()
        options = None if given.options is None else tuple(sorted(given.options.items()))
        if given.backend == "cudagraphs" or dict(options or ()).get("triton.cudagraphs"):
            raise ValueError(
                "`compile_config` asks the compiler for CUDA graphs, which are recorded here: leave "
                '`backend="cudagraphs"` and `options={"triton.cudagraphs": True}` out.'
            )
        return cls(given.backend, None if options else MODES.get(given.mode, given.mode), options)

    @classmethod
    def usual(cls) -> CompileOptions:
        """The default options, for a call without `compile_config`."""
        return cls()

    def for_one_row(self) -> CompileOptions:
        """These options; the default ones are tuned so that products of one row run at memory bandwidth.

        With coordinate descent tuning, the compiler generates such a product as a sum instead of calling a library.
        Measured on an H100 with a T5 of 24 layers, width 1024, bf16: 1.21 ms a step instead of 1.45 ms.
        """
        if (self.backend, self.mode, self.options) != ("inductor", None, None):
            return self
        return replace(self, options=(("coordinate_descent_tuning", True),))

    def compile(self, function: Callable, dynamic: bool | None = None) -> Callable:
        """The function, compiled at its first call with each kind of arguments."""
        if self.backend is None:
            return function
        logger.warning_once(
            "Compiling the decoder: the first calls take a quarter of a minute for every length of segment between "
            "exit points and every number of rows, later ones nothing. `model.warm_up(...)` does it beforehand."
        )
        options = None if self.options is None else dict(self.options)
        call, arguments = {"backend": self.backend, "mode": self.mode, "options": options}, {"dynamic": dynamic}
        return torch.compile(with_code_of_its_own(function), fullgraph=True, **call, **arguments)


def with_code_of_its_own(function: Callable) -> Callable:
    """Wrap `function` in a function with its own code object.

    `torch.compile` counts recompilations per code object, across all models and shapes, and stops at a limit.
    """

    def call(*args):
        return function(*args)

    code = call.__code__.replace(co_name=f"call_{next(_numbers)}")
    return FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)


def static_capacity(max_length: int) -> int:
    """Capacity, in positions, of a static cache for texts of at most `max_length` tokens."""
    return -(-max_length // STEP) * STEP
