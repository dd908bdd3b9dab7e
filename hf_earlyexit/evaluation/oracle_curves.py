"""Criteria compared to the oracle: agreement with full depth over layers per token.

All points use the same teacher-forced tokens (`evaluation/forced.py`), so they differ only in the choice of exits.
Layers are those that would be chosen: this compares choices, not executed work (see `evaluation/oracle.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from hf_earlyexit.decoding.candidates import Candidate
from hf_earlyexit.evaluation.forced import ForcedTokens
from hf_earlyexit.evaluation.oracle import first_agreeing, shares, stable_from
from hf_earlyexit.exits.separating import separating_thresholds


SWEPT = 128  # thresholds of a criterion's line, besides the given ones
ROUNDING = 1e-9


@dataclass(frozen=True)
class OraclePoint:
    """A way to choose exits, in two numbers.

    Attributes:
        layers: Mean layers per token.
        agreement: The share of tokens whose choice is full depth's.
        threshold: Of the criterion; None without a threshold, as at full depth.
    """

    layers: float
    agreement: float
    threshold: float | None = None


# --- lines ----------------------------------------------------------------------------------------------------------


def criterion_points(forced: ForcedTokens, name: str, thresholds: Iterable[float]) -> list[OraclePoint]:
    """A criterion at several thresholds, the most conservative first, preceded by full depth.

    Args:
        forced: With the confidences of the criterion.
        name: Of the criterion.
        thresholds: Constant over a text. A token exits at the first layer where its confidence is at least the
            threshold, else it runs all layers, as under rule `"row"` of `generate`.
    """
    full = OraclePoint(float(forced.num_layers), 1.0)
    return [full, *(_point(forced, name, threshold) for threshold in sorted(set(thresholds), reverse=True))]


def _point(forced: ForcedTokens, name: str, threshold: float) -> OraclePoint:
    sure = forced.confidences[name] >= threshold
    always = sure.new_ones(len(sure), 1)
    place = torch.cat([sure, always], dim=1).int().argmax(dim=-1, keepdim=True)
    agrees = torch.cat([forced.agrees, always], dim=1).gather(1, place)
    layers = torch.tensor([*forced.layers, forced.num_layers])[place]
    return OraclePoint(_mean(layers), _mean(agrees), threshold)


def swept_thresholds(forced: ForcedTokens, name: str, count: int = SWEPT) -> list[float]:
    """At most `count` thresholds, at equal steps through the sorted confidences, each between two of them."""
    values = np.sort(forced.confidences[name].flatten().double().numpy())
    if not len(values):
        return []
    firsts, thresholds = separating_thresholds(values)
    steps = np.linspace(0, len(values) - 1, count).astype(int)
    passing = np.searchsorted(firsts, steps, side="right") - 1
    return sorted(set(thresholds[passing].tolist()), reverse=True)


def same_layer_points(forced: ForcedTokens) -> list[OraclePoint]:
    """Every token exits after the same layer, without a criterion: a point for each exit point and the last layer."""
    means = forced.agrees.double().mean(dim=0).tolist()
    return [
        OraclePoint(float(layer), mean)
        for layer, mean in zip((*forced.layers, forced.num_layers), (*means, 1.0), strict=True)
    ]


def oracle_points(forced: ForcedTokens) -> list[OraclePoint]:
    """The fewest layers per token for a share of tokens that may disagree, from zero up: corners of the line.

    A token that may disagree exits at the first exit point, so the tokens that agree latest are given up first.
    Between two corners, the tokens given up agree at the same layer, so the line is straight there.
    """
    first = first_agreeing(forced.agrees, forced.layers, forced.num_layers)
    ends = (*forced.layers, forced.num_layers)
    points = []
    for kept in ends[::-1]:  # the deepest layer that any token still runs
        given_up = first > kept
        points.append(OraclePoint(_mean(first.masked_fill(given_up, ends[0])), _mean(~given_up)))
    return points


def _mean(values: torch.Tensor) -> float:
    return float(values.double().mean())


# --- at equal agreement ---------------------------------------------------------------------------------------------


def cheapest(points: Sequence[OraclePoint], agreement: float) -> OraclePoint:
    """The point of a criterion with the fewest layers and at least this agreement; full depth always qualifies.

    Not for the oracle, whose line can be chosen between its corners too (`oracle_layers`).
    """
    return min((one for one in points if one.agreement >= agreement - ROUNDING), key=lambda one: one.layers)


def oracle_layers(points: Sequence[OraclePoint], agreement: float) -> float:
    """The oracle's layers per token at an agreement of at least this share, from the corners of its line."""
    rising = points[::-1]
    return float(np.interp(agreement, [one.agreement for one in rising], [one.layers for one in rising]))


# --- as plain values ------------------------------------------------------------------------------------------------


def oracle_values(forced: ForcedTokens, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """The oracle and the curves of candidates, in the form that an evaluation stores.

    Args:
        forced: With the confidences of all criteria of the candidates, at all exit points.
        candidates: Points of criteria's curves; points of a curve are adjacent.

    Returns:
        `tokens`, `tied` and `rewritten` (shares, see `ForcedTokens`), `same_layer` (points), `oracles` by exit points,
        such as `"2,4,6"`, and `curves` by name: their `exit_layers`, the given thresholds as `asked`, and their
        points.
    """
    curves = {name: list(own) for name, own in groupby(candidates, key=lambda one: one.curve)}
    places = {name: tuple(own[0].keywords.get("exit_layers", forced.layers)) for name, own in curves.items()}
    asked = {layers: forced.asked_at(layers) for layers in dict.fromkeys((forced.layers, *places.values()))}
    return {
        "tokens": len(forced.agrees),
        "tied": _mean(forced.tied),
        "rewritten": _mean(forced.rewritten),
        "same_layer": _plain(same_layer_points(forced)),
        "oracles": {_name(layers): _oracle(own) for layers, own in asked.items()},
        "curves": {name: _curve(asked[places[name]], own) for name, own in curves.items()},
    }


def _name(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))


def _oracle(forced: ForcedTokens) -> dict[str, Any]:
    chosen = {"first": first_agreeing, "stable": stable_from}
    found = {name: choose(forced.agrees, forced.layers, forced.num_layers) for name, choose in chosen.items()}
    ends = forced.layers, forced.num_layers
    return {
        "exit_layers": list(forced.layers),
        **{name: {"layers": _mean(one), "shares": _by_name(shares(one, *ends))} for name, one in found.items()},
        "points": _plain(oracle_points(forced)),
    }


def _by_name(found: dict[int, float]) -> dict[str, float]:
    return {str(layer): share for layer, share in found.items()}


def _curve(forced: ForcedTokens, candidates: Sequence[Candidate]) -> dict[str, Any]:
    name = candidates[0].keywords["exit_criterion"]
    asked = [one.threshold for one in candidates]
    points = criterion_points(forced, name, [*asked, *swept_thresholds(forced, name)])
    return {"exit_layers": list(forced.layers), "asked": asked, "points": _plain(points)}


def _plain(points: Sequence[OraclePoint]) -> list[dict[str, Any]]:
    return [asdict(one) for one in points]
