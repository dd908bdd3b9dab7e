"""Work of a decoder walk with known exits: rows per layer, and the missing K/V that they backfill there.

Pure arithmetic on the layers that tokens ran, independent of models, caches and time. The counts equal those of a
`generate` call with the same exits and `fill="lazy"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


RULES = ("row", "batch")


@dataclass(frozen=True)
class SimulatedWalk:
    """Batches of texts, each walked through the decoder token by token. Index 0 of a layer axis is layer 1.

    Attributes:
        depths: `[batches, steps, rows]`, the layers that each token ran; 0 where the text has ended.
        rows: `[layers, batches, steps]`, as all below: rows that run the layer.
        keys: Positions that these rows attend over together, their own included.
        owed: Positions with missing K/V at the layer that these rows backfill before they run it.
        newcomers: Those of the rows that run the layer for the first time in their text.
        asked: `[layers]`, whether a criterion is evaluated there.
        scores: Whether the criterion reads the vocabulary head.
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
        """Tokens of all texts, end tokens included."""
        return int((self.depths > 0).sum())

    @property
    def steps(self) -> int:
        """Steps in which any row of the batch was live."""
        return int((self.depths > 0).any(axis=2).sum())

    @property
    def mean_layers(self) -> float:
        """Layers per token."""
        return float(self.depths.sum() / self.tokens)

    @property
    def questions(self) -> np.ndarray:
        """Rows for which an exit is evaluated."""
        return self.rows * self.asked[:, None, None]

    @property
    def departed(self) -> np.ndarray:
        """Rows whose last layer this is."""
        layers = np.arange(1, len(self.rows) + 1)[:, None, None]
        return np.stack([(self.depths == layer).sum(axis=2) for layer in layers.flat])

    @property
    def head_rows(self) -> np.ndarray:
        """Rows that run the vocabulary head on their state after the layer."""
        last = np.arange(len(self.rows)) == len(self.rows) - 1
        return self.departed * last[:, None, None] + self.questions if self.scores else self.departed

    @property
    def head_products(self) -> np.ndarray:
        """Rows in each product with the head's weights.

        If the criterion scores, there is a product per layer. Otherwise all rows share one product, counted at the
        last layer.
        """
        if self.scores:
            return self.head_rows
        together = np.zeros_like(self.rows)
        together[-1] = self.head_rows.sum(axis=0)
        return together

    def work_by_layer(self) -> dict[str, list[int]]:
        """The counts of an `EarlyExitGenerateOutput`, under its names."""
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
    """Simulate a decoder walk of tokens whose first passing layer is known.

    Args:
        could_leave: `[batches, steps, rows]`, the first layer at which the token passes the criterion; 0 where the
            text has ended.
        num_layers: Layers of the decoder.
        exit_layers: Exit points. A token exits at the first that is not below its layer in `could_leave`.
        scores: Whether the criterion reads the vocabulary head.
        rule: `"row"`: each row exits on its own. `"batch"`: all rows exit where the last one may.
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
    """Leading positions that are complete at each layer before each step; a row that runs a layer backfills all gaps.

    Args:
        visiting: `[layers, batches, steps, rows]`, whether the row runs the layer.
    """
    position = np.arange(visiting.shape[2], dtype=np.int32)[None, None, :, None]
    after = np.maximum.accumulate(visiting * (position + 1), axis=2)
    return np.concatenate([np.zeros_like(after[:, :, :1]), after[:, :, :-1]], axis=2)


def batches_of(layers_run: Sequence[Sequence[int]], batch_size: int) -> np.ndarray:
    """Texts in order, `batch_size` at a time: `[batches, steps, rows]`, 0 after the end of a text."""
    texts = [*layers_run, *[[]] * (-len(layers_run) % batch_size)]
    padded = np.zeros((len(texts), max(map(len, texts))), dtype=np.int32)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
    return padded.reshape(-1, batch_size, padded.shape[1]).transpose(0, 2, 1)


def pieces_of(layers_run: Sequence[Sequence[int]], batches: int, rows: int, tokens: int) -> np.ndarray:
    """Concatenated texts cut into pieces of equal length, `[batches, tokens, rows]`, repeated if there are too few.

    Where a text ends within a piece, the next text continues it as if it were the same text.
    """
    stream = np.concatenate([np.asarray(text, dtype=np.int32) for text in layers_run])
    return np.resize(stream, (batches, rows, tokens)).transpose(0, 2, 1)


def draw_layers(distribution: Sequence[float], texts: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Layers of `texts x tokens` tokens, drawn independently.

    Args:
        distribution: The share of tokens that run 1, 2, ... layers.
    """
    shares = np.asarray(distribution, dtype=float)
    layers = np.arange(1, len(shares) + 1)
    return np.random.default_rng(seed).choice(layers, (texts, tokens), p=shares / shares.sum()).tolist()
