"""The implementations of the decoder by name: which one a call uses, and a model that uses a given one.

All compute the same function and round differently. A certificate names the measured one and those compared with it.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from hf_earlyexit.kernels.compiling import CompileOptions


PLAIN, PREPARED, COMPILED = "plain", "prepared", "compiled"
IMPLEMENTATIONS = (PLAIN, PREPARED, COMPILED)


def implementation_of(model: PreTrainedModel, config: GenerationConfig) -> str:
    """The implementation that a call with this prepared generation config uses.

    Compilation with options other than the usual ones has a name of its own.
    """
    try:
        options = CompileOptions.of(config, model.device)
    except ValueError:  # `generate` refuses the call later
        options = None
    if options is not None:
        return COMPILED if options == CompileOptions.usual() else f"{COMPILED} with {options}"
    return PREPARED if model.has_fresh_copy() else PLAIN


def check_implementations(names: Any) -> None:
    """Check a list of implementation names.

    Raises:
        ValueError: The value is not such a list, or names one twice.
    """
    known = not isinstance(names, str) and names and all(name in IMPLEMENTATIONS for name in names)
    if not known or len(set(names)) < len(names):
        raise ValueError(f"`implementations` must be some of {list(IMPLEMENTATIONS)}, each once, got {names!r}.")


def on_implementation(model: PreTrainedModel, name: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model that shares all weights and uses this implementation, and the keywords that `generate` needs for it.

    Raises:
        ValueError: The decoder cannot be prepared.
    """
    alias = copy.copy(model)
    if name == PLAIN:
        alias.unprepare()
    elif not alias.has_fresh_copy():
        alias.prepare_for_generation()
    return alias, {"cache_implementation": "static"} if name == COMPILED else {}
