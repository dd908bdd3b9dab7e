"""Answers for whether weights are the ones that something was measured with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from transformers import PreTrainedTokenizerBase

from hf_earlyexit.policies import at_least_float32


def weights_fingerprint(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None) -> str:
    """SHA-256 of all weights, by name: models with the same one say the same.

    Half precisions are read as fp32, so that loading a bf16 checkpoint in fp32 and saving it again changes nothing.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((state_dict or model.state_dict()).items()):
        digest.update(name.encode())
        values = at_least_float32(tensor.detach()) if tensor.is_floating_point() else tensor.detach()
        digest.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of its vocabulary and its kind."""
    text = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(text.encode()).hexdigest()


def weights_marks(model: torch.nn.Module) -> tuple[tuple[int, int], ...]:
    """Where every weight lies and how often it was written to: the same marks, the same weights, without reading them.

    Moving a model changes its marks, too. Weights made in inference mode keep no count, and writing through `.data` is
    not counted.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)
