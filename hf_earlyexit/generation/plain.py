"""Checks that a module computes exactly what its class and weights define, so that its weights can be read directly.

Adapters, wrappers, quantisation and offloading change what a module's call computes, or where its weights are. Code
that reads a module's `weight` checks it here first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from hf_earlyexit.common.library import RECORDERS


def is_plain_linear(module: nn.Module, kind: type[nn.Linear] = nn.Linear) -> bool:
    """Whether the module is exactly a `kind`, without hooks, with a dense weight in memory."""
    return type(module) is kind and is_untouched(module) and has_dense_weight(module)


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of the module runs the `forward` of its class and nothing else."""
    return not is_hooked(module) and "forward" not in vars(module)


def has_dense_weight(module: nn.Module) -> bool:
    """Whether `weight` is a parameter with readable values: not quantised, sharded, computed or offloaded."""
    weight = module._parameters.get("weight")
    return weight is not None and is_dense(weight)


def is_dense(weight: Any) -> bool:
    """Whether the weight is a plain tensor whose values are in memory, in the form in which they are used."""
    return isinstance(weight, Tensor) and type(weight.data) is Tensor and not weight.is_meta


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks, other than the library's, which only record hidden states on request.

    Hooks of accelerate count.
    """
    return is_moved(module) or has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has torch hooks other than the library's recorders."""
    return has_hooks_before(module) or _any_but_recorders(module._forward_hooks)


def has_hooks_before(module: nn.Module) -> bool:
    """Whether the module has forward pre-hooks, which see and may change its arguments."""
    return _any_but_recorders(module._forward_pre_hooks)


def _any_but_recorders(hooks: Mapping[int, Callable]) -> bool:
    return any(getattr(hook, "__module__", None) != RECORDERS for hook in hooks.values())


def is_moved(module: nn.Module) -> bool:
    """Whether accelerate moves the module's weights and inputs to where they are needed (offloading, dispatching)."""
    return "_hf_hook" in vars(module)


def described(module: nn.Module) -> str:
    """The class of a module, and the kind of its weight if that is not a plain tensor; for error messages."""
    kind, weight = type(module), module._parameters.get("weight")
    is_torchs = getattr(nn, kind.__name__, kind) is kind
    name = f"a `{kind.__name__}`" if is_torchs else f"a `{kind.__module__}.{kind.__name__}`"
    return name if weight is None or is_dense(weight) else f"{name} with weights {where(weight)}"


def where(weight: Any) -> str:
    """Why a weight cannot be read; for error messages."""
    on_meta = isinstance(weight, Tensor) and weight.is_meta
    return "on the meta device" if on_meta else f"of type `{type(getattr(weight, 'data', weight)).__name__}`"
