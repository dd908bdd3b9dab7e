"""Products of a few rows with packed weights.

A decoding step multiplies a few rows with every weight, so it is bound by reading weights. With 1 to 16 rows on a CPU,
`nn.Linear` reads weights at a third to a half of the memory bandwidth; oneDNN's packed layout reads them at two thirds
and more. Independent of models.
"""

from __future__ import annotations

import functools

import torch
from torch.nn.functional import linear

from hf_earlyexit.kernels.kernel_switch import optional_kernels


# Fewer rows are padded to this number: oneDNN's kernel for 4 rows is faster than the one for 1. Measured on one thread
# of an AMD EPYC, fp32, 512 x 2048: `nn.Linear` 437 us with 1 row and 589 us with 8; packed 320 us with 1 row, 227 us
# with 4 and 305 us with 8.
ROW_TILE = 4

# Weights with fewer entries are not packed: a packed product has 10 us of additional overhead. Measured on the same
# machine: 192 x 192 takes 22 to 30 us unpacked and 25 to 27 us packed, 256 x 256 takes 34 to 50 us and 30 to 36 us.
SMALLEST_PACKED = 50_000


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of this dtype and device are packed; others keep their layout."""
    if device.type != "cpu" or not optional_kernels():
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype in (torch.float32, torch.bfloat16) and multiplies_packed(dtype)


@functools.cache
def multiplies_packed(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a packed kernel for `dtype` with the instructions it may use here, found by trying."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    weight, rows = torch.ones(32, 32, dtype=dtype), torch.ones(ROW_TILE, 32, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROW_TILE)
        return bool((packed_product(rows, packed) == 32).all())
    except RuntimeError:
        return False


def packed_product(rows: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """The product `[rows, out]` of `rows [rows, in]` and a packed weight, without a bias."""
    return torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")


class PackedLinear:
    """A linear map without bias, `[rows, in] -> [rows, out]`.

    If the weight is packed, the result for a row does not depend on the other rows, not even in rounding. So the texts
    of a batch are rounded as they would be alone.

    Args:
        weight: `[out, in]`. Kept unpacked if there is no packed kernel for it or it is too small.
    """

    def __init__(self, weight: torch.Tensor):
        weight = weight.detach()
        self.out_features, self.dtype = weight.shape[0], weight.dtype
        self.is_packed = weight.numel() >= SMALLEST_PACKED and packs(weight.dtype, weight.device)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROW_TILE) if self.is_packed else weight

    @property
    def plain_weight(self) -> torch.Tensor:
        """The weight `[out, in]` for `torch.nn.functional.linear`.

        Raises:
            RuntimeError: The weight is packed.
        """
        if self.is_packed:
            raise RuntimeError("A packed weight is laid out for one kernel: there is no plain one.")
        return self.weight

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.is_packed:
            return linear(rows, self.weight)
        rows = rows.to(self.dtype)  # an earlier operation may be half precision under autocast
        return packed_product(rows, self.weight)


def at_least_a_tile(rows: torch.Tensor) -> torch.Tensor:
    """`rows [rows, width]`; on a CPU, padded with rows of zeros to at least `ROW_TILE` rows."""
    if not rows.is_cpu:  # weights are packed on CPUs only
        return rows
    missing = ROW_TILE - rows.shape[0]
    return torch.constant_pad_nd(rows, (0, 0, 0, missing)) if missing > 0 else rows
