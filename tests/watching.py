"""Scripted and recording criteria, and counters of executed work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch

from hf_earlyexit import ExitPoint
from hf_earlyexit.decoding.run import ExitRun
from hf_earlyexit.exits.separating import separating_thresholds


@dataclass(frozen=True)
class Scripted:
    """Exits after the layer `script(row, position)`; use with threshold 0.5."""

    script: Callable[[int, int], int]

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        sure = [point.layer >= self.script(row, at) for row, at in zip(point.rows, point.positions)]
        return torch.tensor(sure, dtype=torch.float64)


def pseudo_random_script(seed: int, num_layers: int) -> Callable[[int, int], int]:
    """An exit layer for every row and position, uniform over the layers."""
    return lambda row, position: 1 + hash((seed, row * 7919, position * 104729, row ^ position)) % num_layers


@dataclass(frozen=True)
class Recording:
    """Wraps another criterion and records its confidences."""

    criterion: object
    seen: dict[tuple[int, int, int], float] = field(default_factory=dict)

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        confidence = self.criterion.confidence(point)
        for row, position, value in zip(point.rows, point.positions, confidence.tolist()):
            self.seen[row, position, point.layer] = value
        return confidence


def threshold_for(model, inputs, criterion, quantile: float = 0.6, **kwargs) -> float:
    """A threshold that some tokens pass early, some late and some never.

    It is a quantile of the confidences at threshold 1, midway between two of them, so that rounding cannot change an
    exit.
    """
    recording = Recording(criterion)
    model.generate(**inputs, exit_criterion=recording, exit_threshold=1.0, **kwargs)
    _, thresholds = separating_thresholds(np.sort(np.array(list(recording.seen.values()))))
    return float(np.quantile(thresholds, quantile, method="nearest"))


@contextmanager
def counting(model):
    """Counts, at the modules themselves, the rows x positions that run, by block, K projection and head.

    A head with hooks is always called as a module, so the head is counted in its class. Rows of its weight that are
    scored for candidates go through no module and are counted at the adapter.
    """
    counts = {"block": Counter(), "keys": Counter(), "head": Counter(), "candidates": Counter()}
    score_some = model.decoder_adapter.lm_head_rows

    def count(kind: str, name):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            counts[kind][name] += output.shape[:-1].numel()

        return hook

    def counted(decoder, head_input, ids):
        counts["candidates"][0] += ids.numel()
        return score_some(decoder, head_input, ids)

    def counted_head(module, states):
        if module is model.lm_head:
            counts["head"][0] += states.shape[:-1].numel()
        return run_map(module, states)

    hooks, run_map = [], type(model.lm_head).forward
    for layer, block in enumerate(model.decoder.block, start=1):
        hooks.append(block.register_forward_hook(count("block", layer)))
        hooks.append(block.layer[0].SelfAttention.k.register_forward_hook(count("keys", layer)))
    try:
        with (
            mock.patch.object(type(model.lm_head), "forward", counted_head),
            mock.patch.object(model.decoder_adapter, "lm_head_rows", counted),
        ):
            yield counts
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def watched_exits(model, candidates: int):
    """Records, for every row that exits at an exit point, its layer, its best candidate and the best token there.

    The candidates are recomputed from the logits at the row's first exit point of the step; the best token is taken
    over the whole vocabulary.
    """
    departures, chosen, exiting = [], {}, ExitRun.exiting

    def watched(run: ExitRun, point: ExitPoint) -> list[int]:
        leaving = exiting(run, point)
        logits = model.lm_head(model.exit_head_input(point.layer, point.hidden))
        first = chosen.setdefault(len(run.steps), dict(zip(point.rows, logits.topk(candidates).indices)))
        for place in leaving:
            ids = first[point.rows[place]]
            best, says = ids[logits[place, ids].argmax()], logits[place].argmax()
            departures.append((point.layer, int(best), int(says)))
        return leaving

    with mock.patch.object(ExitRun, "exiting", watched):
        yield departures
