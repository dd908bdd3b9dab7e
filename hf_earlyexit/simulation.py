"""Answers for the work of a walk that is known beforehand: which rows come to which layer, and what they pay there.

Arithmetic on the layers that tokens ran, nothing else: knows no model, no cache and no time. It counts what a call of
`generate` with the same exits and `fill="lazy"` counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


RULES = ("row", "batch")


@dataclass(frozen=True)
class SimulatedWalk:
    """Batches of texts, each walked through the decoder token by token. Layers are counted from 1, at place 0.

    Attributes:
        depths: `[batches, steps, rows]`, the layers that each token ran; 0 where the text has ended.
        rows: `[layers, batches, steps]`, as all below: rows that come to the layer.
        keys: Positions that these rows attend over together, their own included.
        owed: Positions whose keys and values they pay for there before they go on.
        newcomers: Those of the rows that come there for the first time in their text.
        asked: `[layers]`, whether a criterion is asked there.
        scores: Whether it looks at the vocabulary head.
    """

    depths: np.ndarray
    rows: np.ndarray
    keys: np.ndarray
    owed: np.ndarray
    newcomers: np.ndarray
    asked: np.ndarray
    scores: bool

    @property
    def tokens(self) -> int:
        """Of all texts, end tokens included."""
        return int((self.depths > 0).sum())

    @property
    def steps(self) -> int:
        """Steps in which any row of the batch was alive."""
        return int((self.depths > 0).any(axis=2).sum())

    @property
    def mean_layers(self) -> float:
        """Layers per token."""
        return float(self.depths.sum() / self.tokens)

    @property
    def questions(self) -> np.ndarray:
        """Rows asked, where anyone is."""
        return self.rows * self.asked[:, None, None]

    @property
    def departed(self) -> np.ndarray:
        """Rows whose last layer this is."""
        layers = np.arange(1, len(self.rows) + 1)[:, None, None]
        return np.stack([(self.depths == layer).sum(axis=2) for layer in layers.flat])

    @property
    def head_rows(self) -> np.ndarray:
        """Rows that meet the vocabulary head with their state after the layer."""
        last = np.arange(len(self.rows)) == len(self.rows) - 1
        return self.departed * last[:, None, None] + self.questions if self.scores else self.departed

    @property
    def head_products(self) -> np.ndarray:
        """Rows in each product with the head's weights: of one layer if scored there, else of all at the last place,
        since those that nobody has scored meet the head together."""
        if self.scores:
            return self.head_rows
        together = np.zeros_like(self.rows)
        together[-1] = self.head_rows.sum(axis=0)
        return together

    def work_by_layer(self) -> dict[str, list[int]]:
        """The counts of an `EarlyExitGenerateOutput`, by its names."""
        by_layer = lambda counts: counts.sum(axis=(1, 2)).tolist()  # noqa: E731
        return {
            "layer_rows": by_layer(self.rows),
            "filled_positions": by_layer(self.owed),
            "head_rows": [0, *by_layer(self.head_rows)],
        }


def simulate(
    could_leave: np.ndarray,
    num_layers: int,
    exit_layers: Sequence[int],
    *,
    scores: bool = False,
    rule: str = "row",
) -> SimulatedWalk:
    """Walk through the decoder tokens of which it is known from which layer on they pass the criterion.

    Args:
        could_leave: `[batches, steps, rows]`, that layer; 0 where the text has ended.
        num_layers: Of the decoder.
        exit_layers: Layers at which tokens are asked; they leave at the first that is not below theirs.
        scores: Whether the criterion looks at the vocabulary head.
        rule: `"row"`: each row leaves on its own. `"batch"`: all where the last one may.
    """
    depths = leave_at(could_leave, num_layers, exit_layers, rule)
    layers = np.arange(1, num_layers + 1)
    visiting = depths[None] >= layers[:, None, None, None]
    position = np.arange(depths.shape[1])[None, None, :, None]
    filled = filled_before(visiting)
    return SimulatedWalk(
        depths=depths,
        rows=visiting.sum(axis=3),
        keys=(visiting * (position + 1)).sum(axis=3),
        owed=(visiting * (position - filled)).sum(axis=3),
        newcomers=(visiting & (filled == 0)).sum(axis=3),
        asked=np.isin(layers, list(exit_layers)),
        scores=scores,
    )


def leave_at(could_leave: np.ndarray, num_layers: int, exit_layers: Sequence[int], rule: str = "row") -> np.ndarray:
    """The layers that each token runs, shaped like `could_leave`; 0 where the text has ended.

    Raises:
        ValueError: The rule is unknown.
    """
    if rule not in RULES:
        raise ValueError(f"`rule` must be one of {RULES}, got {rule!r}.")
    ends = np.array([*sorted(set(exit_layers) - {num_layers}), num_layers])
    depths = ends[np.searchsorted(ends, np.minimum(could_leave, num_layers))]
    if rule == "batch":
        depths = np.broadcast_to(np.where(could_leave > 0, depths, 0).max(axis=2, keepdims=True), depths.shape)
    return np.where(could_leave > 0, depths, 0)


def filled_before(visiting: np.ndarray) -> np.ndarray:
    """Leading positions that are complete at each layer before each step; a row that comes there leaves no gap.

    Args:
        visiting: `[layers, batches, steps, rows]`, whether the row comes to the layer.
    """
    position = np.arange(visiting.shape[2], dtype=np.int32)[None, None, :, None]
    after = np.maximum.accumulate(visiting * (position + 1), axis=2)
    return np.concatenate([np.zeros_like(after[:, :, :1]), after[:, :, :-1]], axis=2)


def batches_of(layers_run: Sequence[Sequence[int]], batch_size: int) -> np.ndarray:
    """Texts in order, `batch_size` at a time: `[batches, steps, rows]`, 0 behind each text's end."""
    texts = [*layers_run, *[[]] * (-len(layers_run) % batch_size)]
    padded = np.zeros((len(texts), max(map(len, texts))), dtype=np.int32)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
    return padded.reshape(-1, batch_size, padded.shape[1]).transpose(0, 2, 1)


def pieces_of(layers_run: Sequence[Sequence[int]], batches: int, rows: int, tokens: int) -> np.ndarray:
    """Texts one behind the other, cut into pieces of equal length: `[batches, tokens, rows]`; from the start again
    where there are too few. Where a text ends within a piece, the next one goes on as if it were the same."""
    stream = np.concatenate([np.asarray(text, dtype=np.int32) for text in layers_run])
    return np.resize(stream, (batches, rows, tokens)).transpose(0, 2, 1)


def draw_layers(distribution: Sequence[float], texts: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Layers of `texts x tokens` tokens, each drawn for itself.

    Args:
        distribution: The share of tokens that run 1, 2, ... layers.
    """
    shares = np.asarray(distribution, dtype=float)
    layers = np.arange(1, len(shares) + 1)
    return np.random.default_rng(seed).choice(layers, (texts, tokens), p=shares / shares.sum()).tolist()
