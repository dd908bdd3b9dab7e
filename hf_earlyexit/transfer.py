"""Small transfers between host and device that do not stall the device.

`torch.tensor(values, device="cuda")` and indexing with a Python list copy from pageable memory, and `tolist()` of a
device tensor copies into it: each waits for everything that was enqueued. Page-locked memory needs no such wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(values: Sequence, device: torch.device | str) -> torch.Tensor:
    """Integers as a `LongTensor` on the device; the copy is enqueued, nothing waits for it."""
    tensor = torch.tensor(values, dtype=torch.long)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> list:
    """The values of a tensor as (nested) lists: one read, for which the host waits."""
    if not tensor.is_cuda:
        return tensor.tolist()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    read = torch.cuda.Event()
    read.record(torch.cuda.current_stream(tensor.device))  # the current device may be another
    read.synchronize()
    return host.tolist()


def settle(device: torch.device) -> None:
    """Wait until what this stream has made is made, so that other streams may use it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def take(tensor: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """`tensor [rows, ...]` at these ascending places: itself if they are all, a view if they are neighbours."""
    if len(places) == len(tensor):
        return tensor
    if len(places) > 0 and places[-1] - places[0] == len(places) - 1:
        return tensor[places[0] : places[-1] + 1]
    return tensor.index_select(0, to_device(places, tensor.device))
