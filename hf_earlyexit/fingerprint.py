"""Answers for whether weights are the ones that something was measured with."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import PreTrainedTokenizerBase

from hf_earlyexit.plain import is_dense, where
from hf_earlyexit.policies import at_least_float32


def weights_fingerprint(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None) -> str:
    """SHA-256 of all weights, by name: models with the same one say the same.

    Half precisions are read as fp32, so that loading a bf16 checkpoint in fp32 and saving it again changes nothing.

    Raises:
        ValueError: A weight has no numbers to be read: offloaded, or quantised in a format of its own.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((state_dict or model.state_dict()).items()):
        if not is_dense(tensor):
            raise ValueError(
                f"The weights of `{name}`, {where(tensor)}, cannot be read to tell whether they are the same again: "
                "load the model unquantised and into memory."
            )
        digest.update(name.encode())
        values = at_least_float32(tensor.detach()) if tensor.is_floating_point() else tensor.detach()
        digest.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of its vocabulary and its kind."""
    text = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(text.encode()).hexdigest()


class WeightsMarks(NamedTuple):
    """What is known of weights without reading them.

    Attributes:
        steps: A number that differs between two times if any optimizer of this process has stepped in between.
        tensors: Where every weight lies, and how often it was written to as far as torch counts that.
    """

    steps: int
    tensors: tuple[tuple[int, int], ...]


def weights_marks(model: torch.nn.Module) -> WeightsMarks:
    """Marks of the weights as they are: the same marks, the same weights, without reading them.

    Fused optimizers write without being counted, so every step of any optimizer changes the marks, and so does moving
    a model. Not noticed are writes through `.data` outside of optimizers, and writes to weights made in inference
    mode, which keep no count.
    """
    # As `parameters` and `buffers` say, but for the order and what is there twice, in a third of the time.
    modules = [model]
    for module in modules:
        modules.extend(module.children())
    held = (one for module in modules for one in (*module._parameters.values(), *module._buffers.values()))
    tensors = [one for one in held if one is not None]
    counts = ((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)
    return WeightsMarks(_Steps.latest, tuple(counts))


def weights_sums(model: torch.nn.Module) -> list[torch.Tensor]:
    """Sums of the bits of every weight, to tell whether optimizer steps were this model's: at the speed of memory."""
    return [_bit_sums(tensor) for tensor in (*model.parameters(), *model.buffers())]


def same_sums(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two lists of sums are of the same weights."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


COLUMNS = 64


def _bit_sums(tensor: torch.Tensor) -> torch.Tensor:
    """`[64]`: the memory as integers of 64 bits in 64 columns, summed. In columns, so that changes which are equal
    but for the sign, as those of Adam's first step, do not cancel. Of a quantised weight, which has no memory of its
    own, only whether any optimizer has stepped."""
    if type(tensor.data) is not torch.Tensor:
        return torch.full((COLUMNS,), _Steps.latest)
    memory = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = len(memory) // (8 * COLUMNS) * (8 * COLUMNS)
    tail = torch.zeros(8 * COLUMNS, dtype=torch.uint8, device=tensor.device)
    tail[: len(memory) - whole] = memory[whole:]
    body = memory[:whole] if memory.storage_offset() % 8 == 0 else memory[:whole].clone()
    return body.view(torch.int64).view(-1, COLUMNS).sum(0) + tail.view(torch.int64)


class _Steps:
    """How many times optimizers of this process have begun or ended a step."""

    latest = 0
    numbers = itertools.count(1)


def _count(*args) -> None:
    # Every number is set once, so that threads which step at the same time cannot bring back one that was seen.
    _Steps.latest = next(_Steps.numbers)


# Before, too: a step that is cut off has written.
register_optimizer_step_pre_hook(_count)
register_optimizer_step_post_hook(_count)
