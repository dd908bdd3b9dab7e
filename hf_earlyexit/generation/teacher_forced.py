"""Outputs of every exit point on a labelled batch, teacher-forced with all layers run; the input of training.

Losses are in `training/objectives`. Independent of `generate`: no token exits here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from hf_earlyexit.exits.criteria import ExitPoint
from hf_earlyexit.exits.patience import Streaks


IGNORED = -100


class TeacherForcedExits:
    """The labelled tokens of a batch at every exit point and at the last layer. N = tokens with a label.

    States and scores are computed on first use, for labelled tokens only.

    Args:
        layers: The exit points, as counts of layers run, ascending.
        hidden_states: `[batch, length, hidden]` after 0, 1, ... layers, as the library returns a decoder's. The last
            one has passed the final norm (see `normed`).
        last_logits: `[batch, length, vocabulary]`, logits of the last layer.
        labels: `[batch, length]`, -100 where there is no label.
        score: `(layer, hidden [N, hidden]) -> logits [N, vocabulary]`, an exit's head.
        classify: `(layer, hidden [N, hidden]) -> logits [N]`, an exit's classifier.
        normalize: `hidden [N, hidden] -> [N, hidden]`, the final norm; needed for `normed`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        hidden_states: Sequence[torch.Tensor],
        last_logits: torch.Tensor,
        labels: torch.Tensor,
        score: Callable[[int, torch.Tensor], torch.Tensor],
        classify: Callable[[int, torch.Tensor], torch.Tensor],
        normalize: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.layers, self.num_layers = tuple(layers), len(hidden_states) - 1
        self._hidden_states, self._last_logits = hidden_states, last_logits
        self._mask = labels != IGNORED
        self._labels = labels
        self._score, self._classify, self._normalize = score, classify, normalize

    @cached_property
    def labels(self) -> torch.Tensor:
        """`[N]`."""
        return self._labels[self._mask]

    @cached_property
    def rows(self) -> torch.Tensor:
        """`[N]`, the batch row of each token."""
        return self._mask.nonzero()[:, 0]

    @cached_property
    def positions(self) -> torch.Tensor:
        """`[N]`, the decoder position of each token."""
        return self._mask.nonzero()[:, 1]

    @property
    def batch_size(self) -> int:
        return len(self._labels)

    def hidden(self, layer: int) -> torch.Tensor:
        """`[N, hidden]`, the output of block `layer`, before any norm."""
        return self._hidden_states[layer][self._mask]

    def normed(self, layer: int) -> torch.Tensor:
        """`[N, hidden]`, the output of block `layer` after the final norm.

        The last layer's has also passed the dropout that stock T5 applies there during training.
        """
        hidden = self.hidden(layer)
        return hidden if layer == self.num_layers else self._normalize(hidden)

    def logits(self, layer: int) -> torch.Tensor:
        """`[N, vocabulary]`, logits at an exit point or at the last layer."""
        if layer == self.num_layers:
            return self._last_logits[self._mask]
        return self._score(layer, self.hidden(layer))

    def exit_logits(self, layer: int) -> torch.Tensor:
        """`[N]`, output of the exit classifier before the sigmoid."""
        return self._classify(layer, self.hidden(layer))

    def choices(self, layer: int) -> torch.Tensor:
        """`[N]`, the argmax token at this layer."""
        return self.logits(layer).argmax(dim=-1)

    def agrees(self, layer: int) -> torch.Tensor:
        """`[N]`, whether this layer's argmax token is the last layer's."""
        return self.choices(layer) == self.full_depth_choices

    def exit_point(self, layer: int, streaks: Streaks | None = None) -> ExitPoint:
        """The input of a criterion after `layer`, as in `generate`; each of the N tokens is a separate row.

        Args:
            streaks: Streaks of the exit points evaluated before, in ascending order; None: this is the first one.
        """
        return ExitPoint(
            layer,
            list(range(len(self.labels))),
            self.positions.tolist(),
            self.hidden(layer),
            self.hidden(layer - 1),
            self._score,
            lambda layer, hidden: self._classify(layer, hidden).sigmoid(),
            streaks=streaks,
        )

    @cached_property
    def full_depth_choices(self) -> torch.Tensor:
        """`[N]`, the argmax token at the last layer."""
        return self.choices(self.num_layers)
