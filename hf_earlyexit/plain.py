"""Answers for whether a module computes what its weights say, so that reading these stands for calling it.

Adapters, wrappers, quantisation and offloading all change what a call of a module computes, or where its weights are.
Whatever reads `weight` of a module asks here first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from hf_earlyexit.library import RECORDERS


def is_plain_linear(module: nn.Module, kind: type[nn.Linear] = nn.Linear) -> bool:
    """Whether it is exactly a `kind`, without hooks, with a dense weight that is in memory."""
    return type(module) is kind and is_untouched(module) and has_dense_weight(module)


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of it runs the `forward` of its class and nothing else."""
    return not is_hooked(module) and "forward" not in vars(module)


def has_dense_weight(module: nn.Module) -> bool:
    """Whether its `weight` is a parameter with numbers: not quantised, sharded, computed or offloaded."""
    weight = module._parameters.get("weight")
    return weight is not None and is_dense(weight)


def is_dense(weight: Any) -> bool:
    """Whether it is a tensor whose numbers are in memory, as they are used."""
    return isinstance(weight, Tensor) and type(weight.data) is Tensor and not weight.is_meta


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of it runs hooks, but for the library's, which only record hidden states where asked to."""
    return is_moved(module) or has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether it has hooks of torch, but for the library's recorders."""
    return has_hooks_before(module) or _any_but_recorders(module._forward_hooks)


def has_hooks_before(module: nn.Module) -> bool:
    """Whether hooks see what it is called with, and may change that."""
    return _any_but_recorders(module._forward_pre_hooks)


def _any_but_recorders(hooks: Mapping[int, Callable]) -> bool:
    return any(getattr(hook, "__module__", None) != RECORDERS for hook in hooks.values())


def is_moved(module: nn.Module) -> bool:
    """Whether accelerate brings weights and inputs of it where they are needed (offloading, dispatching)."""
    return "_hf_hook" in vars(module)


def described(module: nn.Module) -> str:
    """Of what class a module is, and its weight where that is no plain tensor: for errors."""
    kind, weight = type(module), module._parameters.get("weight")
    is_torchs = getattr(nn, kind.__name__, kind) is kind
    name = f"a `{kind.__name__}`" if is_torchs else f"a `{kind.__module__}.{kind.__name__}`"
    return name if weight is None or is_dense(weight) else f"{name} with weights {where(weight)}"


def where(weight: Any) -> str:
    """What keeps a weight from being read: for errors."""
    on_meta = isinstance(weight, Tensor) and weight.is_meta
    return "on the meta device" if on_meta else f"of type `{type(getattr(weight, 'data', weight)).__name__}`"
