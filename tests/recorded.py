"""A graph recorder for CPUs, which repeats the recorded operations on the same tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


@dataclass
class Operation:
    """One recorded operation. It is replayed on the same arguments and writes its results to the same tensors."""

    function: Any
    args: tuple
    kwargs: dict[str, Any]
    results: Any


class Recording(TorchDispatchMode):
    """Records operations, and refuses those that a device graph cannot contain."""

    def __init__(self):
        super().__init__()
        self.operations: list[Operation] = []
        self.made: set[int] = set()
        self.storages: set[int] = set()  # of tensors that existed before the recording
        self.inputs: dict[int, tuple[Any, torch.Size, tuple[int, ...]]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "nonzero", "masked_select", "lift_fresh"):
            raise RuntimeError(f"A recorded graph may not use the host: {name}.")
        for tensor in tensors_in((args, kwargs)):
            if id(tensor) not in self.made:
                self.inputs[id(tensor)] = weakref.ref(tensor), tensor.data_ptr()
                self.storages.add(tensor.untyped_storage().data_ptr())
        results = function(*args, **kwargs)
        self.made.update(id(tensor) for tensor in tensors_in(results))
        self.operations.append(Operation(function, args, kwargs, results))
        return results


def tensors_in(values) -> list[torch.Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


class FakeRecorder:
    """Replaces `CudaRecorder`, and counts recordings and replays.

    After every replay, tensors in the graph's own memory are overwritten.
    """

    def __init__(self, device: torch.device):
        self.hosts: list[torch.Tensor] = []
        self.recorded = self.replayed = self.marks = self.waits = 0

    def take_over(self) -> None:
        pass

    def host_buffer(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        self.hosts.append(torch.full(shape, float("nan"), dtype=dtype))
        return self.hosts[-1]

    def mark(self) -> None:
        self.marks += 1

    def wait(self) -> None:
        self.waits += 1
        assert self.waits <= self.marks

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        function()
        with Recording() as recording:
            function()
        self.recorded += 1
        operations, inputs = recording.operations, list(recording.inputs.values())
        temporaries = [
            tensor
            for operation in operations
            for tensor in tensors_in(operation.results)
            if tensor.untyped_storage().data_ptr() not in recording.storages and tensor._base is None
        ]

        def replay() -> None:
            self.replayed += 1
            for reference, address in inputs:
                tensor = reference()
                if tensor is not None:
                    assert tensor.data_ptr() == address, "what a graph reads has moved"
            for operation in operations:
                run_again(operation)
            for tensor in temporaries:  # on a device, other graphs reuse their memory
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0)

        return replay


def run_again(operation: Operation) -> None:
    """Repeat an operation, and copy new results into the recorded result tensors."""
    schema = operation.function._schema
    aliases = [result.alias_info for result in schema.returns]
    if all(alias is not None and not alias.is_write for alias in aliases) and aliases:
        return  # a view: still the same memory
    results = operation.function(*operation.args, **operation.kwargs)
    if any(alias is not None for alias in aliases) or schema.is_mutable:
        return  # written in place
    for old, new in zip(tensors_in(operation.results), tensors_in(results)):
        old.copy_(new)
