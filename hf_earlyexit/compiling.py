"""Answers for how regions are compiled: the options of one `generate` call, as `torch.compile` takes them.

The switch is the library's: `cache_implementation="static"`, and `compile_config` for more. Knows no model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GenerationConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

# A static cache holds a multiple of that many positions.
STEP = 64


@dataclass(frozen=True)
class CompileOptions:
    """What is passed to `torch.compile`: the library's `CompileConfig`, without what is always so, whole graphs."""

    backend: str | Callable = "inductor"
    mode: str | None = None
    options: tuple[tuple[str, str | int | bool], ...] | None = None

    @classmethod
    def of(cls, config: GenerationConfig, device: torch.device) -> CompileOptions | None:
        """Those of a prepared generation config; None where nothing is to be compiled.

        Raises:
            ValueError: This torch keeps one count of graphs for all functions, and would run out of them.
        """
        if config.cache_implementation != "static" or config.disable_compile:
            return None
        usual, given = cls.on(device), config.compile_config
        if given is None:
            return usual
        options = None if given.options is None else tuple(sorted(given.options.items()))
        # The library's default mode is about CUDA graphs.
        mode = None if options or (device.type != "cuda" and given.mode == "reduce-overhead") else given.mode
        return cls(given.backend, mode, options)

    @classmethod
    def on(cls, device: torch.device) -> CompileOptions:
        """The usual ones: with CUDA graphs where there is CUDA.

        Raises:
            ValueError: This torch keeps one count of graphs for all functions, and would run out of them.
        """
        if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
            raise ValueError(
                f'`cache_implementation="static"` needs torch 2.13 or later to compile, found {torch.__version__}: '
                "upgrade it, or pass `disable_compile=True`."
            )
        return cls(mode="reduce-overhead" if device.type == "cuda" else None)

    def compile(self, function: Callable) -> Callable:
        """The function, compiled when it is first called with arguments of a kind."""
        logger.warning_once(
            "Compiling the decoder: the first calls take a quarter of a minute for every length of stretch between "
            "exit points and every bucket of rows, later ones nothing. `model.warm_up(...)` does it beforehand."
        )
        options = None if self.options is None else dict(self.options)
        limits = {"isolate_recompiles": True, "recompile_limit": 64}
        return torch.compile(function, fullgraph=True, backend=self.backend, mode=self.mode, options=options, **limits)


def static_capacity(max_length: int) -> int:
    """Positions of a static cache for texts of that length."""
    return -(-max_length // STEP) * STEP
