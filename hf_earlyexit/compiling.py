"""Answers for how regions are compiled: the options of one `generate` call, as `torch.compile` takes them.

The switch is the library's: `cache_implementation="static"`, and `compile_config` for more. Knows no model.
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

# Graphs on CUDA are recorded by ourselves: the compiler's modes that record its own are taken without.
MODES = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}

_numbers = count()

# A static cache holds a multiple of that many positions.
STEP = 64


@dataclass(frozen=True)
class CompileOptions:
    """What is passed to `torch.compile`: the library's `CompileConfig`, without what is always so, whole graphs.

    Attributes:
        backend: None: nothing is compiled, kernels are torch's own.
    """

    backend: str | Callable | None = "inductor"
    mode: str | None = None
    options: tuple[tuple[str, str | int | bool], ...] | None = None

    @classmethod
    def of(cls, config: GenerationConfig, device: torch.device) -> CompileOptions | None:
        """Those of a prepared generation config; None where nothing is to be compiled or recorded.

        Raises:
            ValueError: The compiler is to record CUDA graphs.
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
        """Those of a call that chooses none."""
        return cls()

    def for_one_row(self) -> CompileOptions:
        """These, or where nothing was chosen those that multiply one row with a weight at the memory's speed.

        With this setting the compiler makes such a product a sum instead of calling a library. Measured on an H100, T5
        of 24 layers of 1024, bf16: 1.21 ms a step instead of 1.45.
        """
        if (self.backend, self.mode, self.options) != ("inductor", None, None):
            return self
        return replace(self, options=(("coordinate_descent_tuning", True),))

    def compile(self, function: Callable, dynamic: bool | None = None) -> Callable:
        """The function, compiled when it is first called with arguments of a kind."""
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
    """The function behind a code object that no other function has.

    `torch.compile` counts recompilations by code object, across all models and shapes, and stops at a limit.
    """

    def call(*args):
        return function(*args)

    code = call.__code__.replace(co_name=f"call_{next(_numbers)}")
    return FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)


def static_capacity(max_length: int) -> int:
    """Positions of a static cache for texts of that length."""
    return -(-max_length // STEP) * STEP
