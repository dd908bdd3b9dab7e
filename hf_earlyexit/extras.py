"""Answers for packages that only some features need: importing them late, and saying what to install."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, which comes with the optional dependencies named `extra`.

    Raises:
        ImportError: It is not installed; the message is the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # it is installed, but lacks something itself
        raise ImportError(f"This needs `{module}`: pip install hf-earlyexit[{extra}]") from error
