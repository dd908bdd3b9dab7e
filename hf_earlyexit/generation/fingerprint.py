"""Fingerprints and cheap versions of weights, to detect changes since something was measured or prepared."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import PreTrainedTokenizerBase

from hf_earlyexit.exits.criteria import at_least_float32
from hf_earlyexit.generation.plain import is_dense, where


def weights_fingerprint(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None) -> str:
    """SHA-256 of all weights, by name.

    Half precisions are read as fp32, so loading a bf16 checkpoint in fp32 and saving it again changes nothing.

    Raises:
        ValueError: The values of a weight cannot be read: it is offloaded, or quantised in a format of its own.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((state_dict or model.state_dict()).items()):
        if not is_dense(tensor):
            raise ValueError(
                f"The weights of `{name}`, {where(tensor)}, cannot be read to compute their fingerprint: "
                "load the model unquantised and into memory."
            )
        digest.update(name.encode())
        values = at_least_float32(tensor.detach()) if tensor.is_floating_point() else tensor.detach()
        digest.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the tokenizer's vocabulary and class name."""
    text = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(text.encode()).hexdigest()


class WeightsMarks(NamedTuple):
    """Parameter versions: what is known of weights without reading them.

    Attributes:
        steps: A number that changes whenever any optimizer of this process steps.
        tensors: Address and torch version counter of every weight.
    """

    steps: int
    tensors: tuple[tuple[int, int], ...]


def parameter_versions(model: torch.nn.Module) -> WeightsMarks:
    """Parameter versions of the current weights: equal versions mean equal weights, without reading them.

    Fused optimizers write without increasing torch's version counter, so every step of any optimizer changes the
    versions. Moving a model changes them, too. Writes through `.data` outside of optimizers are not detected, nor are
    writes to weights made in inference mode, which have no version counter.
    """
    # The tensors of `parameters` and `buffers`, in another order and with duplicates, in a third of the time.
    modules = [model]
    for module in modules:
        modules.extend(module.children())
    held = (one for module in modules for one in (*module._parameters.values(), *module._buffers.values()))
    tensors = [one for one in held if one is not None]
    counts = ((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)
    return WeightsMarks(_Steps.latest, tuple(counts))


def weights_sums(model: torch.nn.Module) -> list[torch.Tensor]:
    """Sums of the bits of every weight, to tell whether optimizer steps changed this model; runs at memory speed."""
    return [_bit_sums(tensor) for tensor in (*model.parameters(), *model.buffers())]


def same_sums(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two lists of sums are equal."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


COLUMNS = 64


def _bit_sums(tensor: torch.Tensor) -> torch.Tensor:
    """`[64]`: the tensor's memory, read as 64-bit integers in 64 columns and summed by column.

    Columns keep changes of equal size and opposite sign, such as those of Adam's first step, from cancelling. A
    quantised weight has no memory of its own; its entry is the latest step number, so any optimizer step changes it.
    """
    if type(tensor.data) is not torch.Tensor:
        return torch.full((COLUMNS,), _Steps.latest)
    memory = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = len(memory) // (8 * COLUMNS) * (8 * COLUMNS)
    tail = torch.zeros(8 * COLUMNS, dtype=torch.uint8, device=tensor.device)
    tail[: len(memory) - whole] = memory[whole:]
    body = memory[:whole] if memory.storage_offset() % 8 == 0 else memory[:whole].clone()
    return body.view(torch.int64).view(-1, COLUMNS).sum(0) + tail.view(torch.int64)


class _Steps:
    """A counter of the beginnings and ends of optimizer steps in this process."""

    latest = 0
    numbers = itertools.count(1)


def _count(*args) -> None:
    # Each number is used once, so threads that step at the same time cannot restore an earlier one.
    _Steps.latest = next(_Steps.numbers)


# Also before the step: an interrupted step has already written weights.
register_optimizer_step_pre_hook(_count)
register_optimizer_step_post_hook(_count)
