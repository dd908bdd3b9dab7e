"""Answers for the product of a few rows with a weight that is laid out for it.

A decoding step multiplies a handful of rows with every weight, so it is bound by reading weights. `nn.Linear` on a CPU
reads them at a third to a half of what the memory gives when there are 1 to 16 rows; oneDNN's packed layout reads them
at two thirds and more. Knows nothing of models.
"""

from __future__ import annotations

import functools

import torch
from torch.nn.functional import linear

from hf_earlyexit.kernel_switch import optional_kernels


# Fewer rows than that are filled up: oneDNN's kernel for 4 rows takes less time than the one for 1. Measured on one
# thread of an AMD EPYC, fp32, 512 x 2048: `nn.Linear` 437 us with 1 row and 589 us with 8; packed 320 us with 1 row,
# 227 us with 4 and 305 us with 8.
ROW_TILE = 4

# Weights with fewer entries are left as they are: a packed product takes 10 us more to begin with. Measured there,
# 192 x 192 takes 22 to 30 us unpacked and 25 to 27 us packed, 256 x 256 takes 34 to 50 and 30 to 36.
SMALLEST_PACKED = 50_000


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of this kind have a packed layout here; others are multiplied as they are."""
    if device.type != "cpu" or not optional_kernels():
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype in (torch.float32, torch.bfloat16) and multiplies_packed(dtype)


@functools.cache
def multiplies_packed(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a kernel for it on this machine, with the instructions that it may use (found by trying)."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    weight, rows = torch.ones(32, 32, dtype=dtype), torch.ones(ROW_TILE, 32, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROW_TILE)
        return bool((packed_product(rows, packed) == 32).all())
    except RuntimeError:
        return False


def packed_product(rows: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """`[rows, out]` of `rows [rows, in]` and a packed weight, without a bias."""
    return torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")


class PackedLinear:
    """A linear map without bias, `[rows, in] -> [rows, out]`.

    Packed, what it makes of a row does not depend on the other rows, not even in rounding, so texts of a batch are
    rounded as they are alone.

    Args:
        weight: `[out, in]`. Kept as it is where nothing packs it.
    """

    def __init__(self, weight: torch.Tensor):
        weight = weight.detach()
        self.out_features, self.dtype = weight.shape[0], weight.dtype
        self.is_packed = weight.numel() >= SMALLEST_PACKED and packs(weight.dtype, weight.device)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROW_TILE) if self.is_packed else weight

    @property
    def plain_weight(self) -> torch.Tensor:
        """`[out, in]`, as `torch.nn.functional.linear` takes it.

        Raises:
            RuntimeError: It is packed.
        """
        if self.is_packed:
            raise RuntimeError("A packed weight is laid out for one kernel: there is no plain one.")
        return self.weight

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.is_packed:
            return linear(rows, self.weight)
        rows = rows.to(self.dtype)  # where autocast has made an operation before it half
        return packed_product(rows, self.weight)


def at_least_a_tile(rows: torch.Tensor) -> torch.Tensor:
    """`rows [rows, width]`, on a CPU with rows of zeros behind them if they are fewer than a tile."""
    if not rows.is_cpu:  # nothing is packed there
        return rows
    missing = ROW_TILE - rows.shape[0]
    return torch.constant_pad_nd(rows, (0, 0, 0, missing)) if missing > 0 else rows
