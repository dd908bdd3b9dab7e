"""The switch for optional kernels, which make decoding faster but are not needed for correctness."""

from __future__ import annotations

import os


SWITCH = "HF_EARLYEXIT_OPTIONAL_KERNELS"


def optional_kernels() -> bool:
    """Whether optional kernels are used: True unless the environment variable `HF_EARLYEXIT_OPTIONAL_KERNELS` is 0.

    Without them, a prepared copy of the weights uses `nn.functional.linear` on the model's own layout and the
    library's activation. The variable is read when a copy is made.

    Raises:
        ValueError: The variable is neither 0 nor 1.
    """
    value = os.environ.get(SWITCH, "1")
    if value not in ("0", "1"):
        raise ValueError(f"The environment variable `{SWITCH}` must be 0 or 1, got {value!r}.")
    return value == "1"
