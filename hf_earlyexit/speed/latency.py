"""Latency of a `generate` call by phase: encoder, first token, further tokens. Works with any encoder-decoder.

Times are wall-clock times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, StoppingCriteria


@dataclass
class CallTimes:
    """One call of `generate`. All times are in seconds.

    Attributes:
        start: When the call started.
        steps: When each token of the batch was available.
        end: When the call ended.
        encoder: Time spent in the encoder.
        tokens: Tokens written by all rows, end tokens included.
    """

    start: float
    steps: list[float] = field(default_factory=list)
    end: float = 0.0
    encoder: float = 0.0
    tokens: int = 0

    @property
    def first_token(self) -> float:
        """From the start to the first token, encoder included."""
        return self.steps[0] - self.start

    @property
    def inter_token(self) -> list[float]:
        """Between consecutive tokens."""
        return [later - earlier for earlier, later in pairwise(self.steps)]

    @property
    def whole(self) -> float:
        """From the start to the end."""
        return self.end - self.start


class StepClock(StoppingCriteria):
    """Records the time of each token; never stops generation.

    Args:
        times: Times of the call.
    """

    def __init__(self, times: CallTimes):
        self.times = times

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs) -> torch.BoolTensor:
        self.times.steps.append(_now(input_ids.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def timed_generate(
    model: PreTrainedModel, generate: Callable[..., torch.Tensor], batch: Mapping[str, Any]
) -> CallTimes:
    """Generate, and record the time of each phase.

    Args:
        model: An encoder-decoder.
        generate: The model's `generate` or a wrapper; takes the batch and `stopping_criteria`, returns decoder ids.
        batch: Inputs, without a decoder prompt, and further keywords of `generate`.
    """
    times = CallTimes(start=_now(model.device))
    with _encoder_timed(model, times):
        ids = generate(**batch, stopping_criteria=[StepClock(times)], return_dict_in_generate=False)
    times.end = _now(model.device)
    times.tokens = count_tokens(ids[:, 1:], model.generation_config.eos_token_id)
    return times


def count_tokens(new_tokens: torch.Tensor, ends: int | Sequence[int] | None) -> int:
    """Tokens of all rows up to and including their first end token; `new_tokens [batch, steps]`."""
    ends = torch.tensor([] if ends is None else ends, dtype=torch.long).flatten()
    ended = torch.isin(new_tokens.cpu(), ends).long().cumsum(dim=1)
    before_or_at_the_end = ended - torch.isin(new_tokens.cpu(), ends).long() <= 0
    return int(before_or_at_the_end.sum())


def summarize(calls: Sequence[CallTimes]) -> dict[str, Any]:
    """Throughput, and medians and 95th percentiles in milliseconds, over many calls.

    Times between tokens are pooled over all calls; None where no text had a second token.
    """
    whole = sum(call.whole for call in calls)
    return {
        "tokens_per_second": sum(call.tokens for call in calls) / whole,
        "inter_token_ms": _milliseconds([step for call in calls for step in call.inter_token]),
        "first_token_ms": _milliseconds([call.first_token for call in calls]),
        "encoder_ms": _milliseconds([call.encoder for call in calls]),
    }


def _milliseconds(seconds: Sequence[float]) -> dict[str, float | None]:
    if not seconds:
        return {"median": None, "p95": None}
    median, p95 = np.percentile(seconds, [50, 95]) * 1000
    return {"median": float(median), "p95": float(p95)}


@contextmanager
def _encoder_timed(model: PreTrainedModel, times: CallTimes) -> Iterator[None]:
    """Add up the time spent in the encoder. The model is restored afterwards, also after an exception."""
    started: list[float] = []

    def begin(module, args) -> None:
        started.append(_now(model.device))

    def end(module, args, output) -> None:
        times.encoder += _now(model.device) - started.pop()

    encoder = model.get_encoder()
    hooks = [encoder.register_forward_pre_hook(begin), encoder.register_forward_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _now(device: torch.device) -> float:
    """Seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
