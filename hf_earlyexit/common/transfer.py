"""Small transfers between host and device that do not stall the device.

`torch.tensor(values, device="cuda")` and indexing with a Python list copy from pageable memory, and `tolist()` of a
device tensor copies into it. Each of these waits for all enqueued work. Page-locked memory needs no such wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(values: Sequence, device: torch.device | str) -> torch.Tensor:
    """Integers as a `LongTensor` on the device. The copy is enqueued without waiting."""
    tensor = torch.tensor(values, dtype=torch.long)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> list:
    """The values of a tensor as (nested) lists, in one read that the host waits for."""
    if not tensor.is_cuda:
        return tensor.tolist()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    read = torch.cuda.Event()
    read.record(torch.cuda.current_stream(tensor.device))  # the current device may be a different one
    read.synchronize()
    return host.tolist()


def settle(device: torch.device) -> None:
    """Wait for all work enqueued on the current stream, so that other streams may use the results."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def take(tensor: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """Rows of `tensor [rows, ...]` at ascending places: the tensor itself for all rows, a view for adjacent rows."""
    if len(places) == len(tensor):
        return tensor
    if len(places) > 0 and places[-1] - places[0] == len(places) - 1:
        return tensor[places[0] : places[-1] + 1]
    return tensor.index_select(0, to_device(places, tensor.device))
