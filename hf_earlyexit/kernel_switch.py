"""One switch for the kernels that decoding is faster with and right without."""

from __future__ import annotations

import os


SWITCH = "HF_EARLYEXIT_OPTIONAL_KERNELS"


def optional_kernels() -> bool:
    """Whether they are used: unless the environment variable `HF_EARLYEXIT_OPTIONAL_KERNELS` is 0.

    Without them a prepared copy multiplies with `nn.functional.linear` on the model's own layout and calls the
    library's activation. Read when a copy is made.

    Raises:
        ValueError: The variable is neither 0 nor 1.
    """
    value = os.environ.get(SWITCH, "1")
    if value not in ("0", "1"):
        raise ValueError(f"The environment variable `{SWITCH}` must be 0 or 1, got {value!r}.")
    return value == "1"
