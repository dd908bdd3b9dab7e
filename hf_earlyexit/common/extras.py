"""Import optional dependencies lazily, with an error that gives the install command."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, which comes with the optional dependencies named `extra`.

    Raises:
        ImportError: The module is not installed; the message gives the install command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # `module` is installed, but one of its own imports is missing
        raise ImportError(f"This needs `{module}`: pip install hf-earlyexit[{extra}]") from error
