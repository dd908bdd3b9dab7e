"""The comparison of law 3 for any dtype, teacher-forced along the generated tokens.

Logits must equal those of a reference in higher precision up to rounding, and every token must be the best by the
logits that it was chosen from.

The size of rounding errors in half precision depends on the model. So the stock model's error is measured in the same
dtype, on the same inputs and device. The allowed distance from the reference is twice that error plus two units in the
last place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from hf_earlyexit import ExitPoint
from tests import laws
from tests.tiny import ENDS, Unrest


Inputs = dict[str, torch.Tensor]


class Forced(LogitsProcessor):
    """Forces the tokens of `sequences [batch, length]`."""

    def __init__(self, sequences: torch.Tensor):
        self.sequences = sequences

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        chosen = self.sequences[:, input_ids.shape[1], None]
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


def stock_logits(stock, inputs: Inputs, sequences: torch.Tensor) -> torch.Tensor:
    """Logits `[batch, new tokens, vocabulary]`, fp32, of a stock model in one forward pass."""
    with torch.no_grad():
        return stock(**inputs, decoder_input_ids=sequences[:, :-1], use_cache=False).logits.float()


def walked_logits(model, inputs: Inputs, sequences: torch.Tensor, **settings) -> torch.Tensor:
    """Logits `[batch, new tokens, vocabulary]`, fp32, of `generate` forced along the sequences."""
    processor, new_tokens = LogitsProcessorList([Forced(sequences)]), sequences.shape[1] - 1
    output = laws.generate(model, inputs, 0, new_tokens, None, **settings | {"logits_processor": processor})
    assert torch.equal(output.sequences, sequences)
    return torch.stack(output.logits, dim=1).float()


def live_tokens(sequences: torch.Tensor) -> torch.Tensor:
    """`[batch, new tokens]`: True up to and including the first end token."""
    ends = torch.isin(sequences[:, 1:], torch.tensor(ENDS, device=sequences.device))
    return ends.cumsum(dim=1) - ends.long() == 0


def unit_in_last_place(logits: torch.Tensor, dtype: torch.dtype) -> float:
    """The unit in the last place of the largest logit by magnitude."""
    _, exponent = torch.frexp(logits.abs().max())
    return torch.finfo(dtype).eps * 2.0 ** (int(exponent) - 1)


def distance(logits: torch.Tensor, reference: torch.Tensor, sequences: torch.Tensor) -> float:
    """The largest root mean square difference of a row, over the steps in which the row is live."""
    live = live_tokens(sequences)
    squares = (logits - reference).square().mean(dim=-1) * live
    return (squares.sum(dim=1) / live.sum(dim=1)).max().sqrt().item()


def allowance(stock, exact_stock, inputs: Inputs, sequences: torch.Tensor) -> float:
    """The allowed distance of logits from the reference along these sequences.

    In fp32, 1e-4 of the largest logit; in half precision, twice the stock model's distance plus two units in the last
    place.
    """
    exact = stock_logits(exact_stock, inputs, sequences)
    if stock.dtype == torch.float32:
        return laws.TOLERANCE * max(1.0, exact.abs().max().item())
    rounding = distance(stock_logits(stock, inputs, sequences), exact, sequences)
    return 2 * rounding + 2 * unit_in_last_place(exact, stock.dtype)


def assert_logits(output, reference: torch.Tensor, allowed: float) -> None:
    """Assert that the logits of `generate` without beams match the reference `[batch, steps, vocabulary]` while rows
    are live."""
    apart = distance(torch.stack(output.logits, dim=1).float(), reference, output.sequences)
    assert apart <= allowed, f"logits are apart by {apart:.2e}, {allowed:.2e} is allowed"


def assert_greedy(output, seed: int) -> None:
    """Assert that every token is the best by its step's logits and the noise of `laws.generate`; finished rows are
    padded."""
    sequences, live, noise = output.sequences, live_tokens(output.sequences), Unrest(seed)
    for step, logits in enumerate(output.logits):
        best = noise(sequences[:, : step + 1], logits).argmax(dim=-1)
        assert torch.equal(sequences[:, step + 1], best.where(live[:, step], torch.zeros_like(best)))


def beam_scores(logits: torch.Tensor, sequences: torch.Tensor, seed: int) -> torch.Tensor:
    """Beam scores `[batch]` of the sequences by these logits: mean log-probability, including noise."""
    noise, live = Unrest(seed), live_tokens(sequences)
    steps = [noise(sequences[:, : at + 1], logits[:, at].log_softmax(dim=-1)) for at in range(logits.shape[1])]
    chosen = torch.stack(steps, dim=1).gather(-1, sequences[:, 1:, None])[..., 0]
    return (chosen * live).sum(dim=1) / live.sum(dim=1)


@dataclass(frozen=True)
class Watched:
    """Exits by a script, and records the confidences of `criterion`."""

    criterion: object
    script: Callable[[int, int], int]
    seen: dict[tuple[int, int, int], float] = field(default_factory=dict)

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        told = self.criterion.confidence(point).tolist()
        self.seen.update({(row, at, point.layer): one for row, at, one in zip(point.rows, point.positions, told)})
        sure = [point.layer >= self.script(row, at) for row, at in zip(point.rows, point.positions)]
        return torch.tensor(sure, dtype=torch.float64)


def assert_exits(output, seen: dict[tuple[int, int, int], float], threshold: float, tolerance: float) -> int:
    """Assert that every row exited at the first exit point where its reference confidence reached the threshold.

    Confidences within `tolerance` of the threshold are not checked. Returns how many were checked.
    """
    judged = 0
    for (row, position, layer), confidence in seen.items():
        depth = int(output.layers_run[row, position]) if position < output.layers_run.shape[1] else 0
        if depth > 0 and abs(confidence - threshold) > tolerance:
            judged += 1
            left = depth == layer
            assert left == (confidence >= threshold), f"row {row}, position {position}, layer {layer}: left is {left}"
    return judged
