"""Host operations of a decoding step: waits for the device, kernel launches, graph launches, copies."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.device_clock import Lengths


SYNCHRONISES = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")


def counts_per_step(call: Callable[[int], Any], device: torch.device, lengths: Lengths) -> dict[str, float] | None:
    """Counts per step, from the difference of a longer and a shorter call, so that fixed costs of a call cancel.

    Returns:
        On CUDA the runtime and driver calls; on a CPU those that the operations would cause. None if no activity was
        recorded.
    """
    count = trace_counts if device.type == "cuda" else dispatch_counts
    few, many = (count(lambda new=new: call(new)) for new in lengths)
    if not many:
        return None
    return {name: (many[name] - few[name]) / (lengths.long - lengths.short) for name in sorted(few | many)}


# --- on CUDA ------------------------------------------------------------------------------------------------------


def trace_counts(call: Callable[[], Any]) -> Counter:
    """Counts from a trace of CUDA's runtime and driver calls."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return counts_of_trace(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def counts_of_trace(events: Iterable[Mapping[str, Any]]) -> Counter:
    """Host waits, launches and copies among the events of a trace."""
    counts: Counter = Counter()
    for event in events:
        category, name = event.get("cat"), event.get("name", "")
        if category in ("cuda_runtime", "cuda_driver"):
            if name in SYNCHRONISES or name in ("cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize"):
                counts["host_waits"] += 1
            elif name.startswith(("cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cuLaunch")):
                counts["kernel_launches"] += 1
            elif name.startswith(("cudaGraphLaunch", "cuGraphLaunch")):
                counts["graph_launches"] += 1
            elif name.startswith(("cudaMemcpyAsync", "cudaMemsetAsync", "cuMemcpy", "cuMemset")):
                counts["copy_launches"] += 1
        elif category == "kernel":
            counts["kernels"] += 1
        elif category == "gpu_memcpy" and "DtoH" in name:
            counts["reads"] += 1
        elif category == "gpu_memcpy" and "HtoD" in name:
            counts["uploads"] += 1
    return counts


# --- on a CPU -----------------------------------------------------------------------------------------------------


class _Operations(TorchDispatchMode):
    """Counts operations that would launch a kernel, and scalars read by the host."""

    def __init__(self, counts: Counter):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.counts["host_waits"] += 1
        elif not any(one.alias_info is not None and not one.alias_info.is_write for one in function._schema.returns):
            self.counts["kernel_launches"] += 1
        return function(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    """Counts `Tensor.tolist`, which would wait for the device, and `torch.tensor`, which would upload."""

    def __init__(self, counts: Counter):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.tolist:
            self.counts["host_waits"] += 1
        elif function is torch.tensor:
            self.counts["uploads"] += 1
        return function(*args, **(kwargs or {}))


def dispatch_counts(call: Callable[[], Any]) -> Counter:
    """Counts of operations that are not views, and of values that Python reads or uploads."""
    counts: Counter = Counter()
    with _Reads(counts), _Operations(counts):
        call()
    return counts
