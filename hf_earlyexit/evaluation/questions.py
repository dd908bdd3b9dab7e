"""Answers to the open questions of arXiv 2407.20272, as far as results give them: effects of batch size and length.

Which threshold is best at which batch size and rule, how long inputs change the results, and how exits affect long
outputs. Works on the plain values of an evaluation; independent of models, figures and report pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from hf_earlyexit.decoding.candidates import FULL_DEPTH, STATIC


Results = dict[str, Any]
POINTS = 2.0
CLOCKS = {"cpu": "CPU clock", "wall": "wall clock"}
# Values further apart than this many standard errors count as different. 1 comparison in 20 exceeds it by chance.
NOTABLE = 2.0


# --- fastest point within the tolerance -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A cell in short form.

    Attributes:
        name: Of the setting.
        threshold: Of the setting.
        ratio: Its time over stock's by the results' clock, median.
        spread: Half of the interquartile range of `ratio`.
        difference: Its ROUGE-L minus full depth's.
        layers: Mean layers per token.
    """

    name: str
    threshold: float
    ratio: float
    spread: float
    difference: float
    layers: float


@dataclass(frozen=True)
class Choice:
    """The fastest point of a curve within the tolerance, at a batch size and rule; None if no point is within it."""

    curve: str
    batch_exit: str
    batch_size: int
    point: Point | None


def tolerance(results: Results) -> float:
    """How many points of ROUGE-L a setting may lose."""
    return results["asked"].get("points", POINTS)


def clock(results: Results) -> str:
    """The clock that times are compared by: `"cpu"`, or `"wall"` where the work is not on the CPU.

    Raises:
        ValueError: The results name an unknown clock.
    """
    name = results["asked"].get("clock", "cpu")
    if name not in CLOCKS:
        raise ValueError(f"the results have times by the clock {name!r}, known are {', '.join(CLOCKS)}.")
    return name


def time_ratio(results: Results, cell: dict[str, Any]) -> dict[str, float]:
    """The time of a cell over stock's by the results' clock: `median`, and `iqr` as a share of it."""
    return cell["time"]["ratio"][clock(results)]


def full_depth(results: Results) -> dict[str, Any]:
    """The quality of full depth, which all others are compared to."""
    return next(one for one in results["quality"].values() if one["curve"] == FULL_DEPTH)


def curves(results: Results) -> list[str]:
    """The curves of criteria, without baselines, in the order of the results."""
    names = dict.fromkeys(one["curve"] for one in results["quality"].values())
    return [name for name in names if name not in (FULL_DEPTH, STATIC)]


def choices(results: Results, asked: Iterable[str] | None = None) -> list[Choice]:
    """The fastest point within the tolerance for each curve, rule and batch size; all criteria by default."""
    groups: dict[tuple[str, str, int], list[Point]] = {}
    for cell in results["cells"]:
        key = (cell["curve"], cell["batch_exit"], cell["batch_size"])
        groups.setdefault(key, []).append(point_of(results, cell))
    wanted = curves(results) if asked is None else list(asked)
    found = [Choice(*key, fastest(points, tolerance(results))) for key, points in groups.items() if key[0] in wanted]
    return sorted(found, key=lambda one: (wanted.index(one.curve), one.batch_exit != "row", one.batch_size))


def point_of(results: Results, cell: dict[str, Any]) -> Point:
    """The point of a cell."""
    quality, time = results["quality"][cell["quality"]], time_ratio(results, cell)
    return Point(
        name=cell["name"],
        threshold=cell["threshold"],
        ratio=time["median"],
        spread=time["median"] * time["iqr"] / 2,
        difference=quality["scores"]["rougeL"]["mean"] - full_depth(results)["scores"]["rougeL"]["mean"],
        layers=quality["mean_layers"]["mean"],
    )


def fastest(points: Iterable[Point], tolerance: float) -> Point | None:
    """The fastest point that loses at most `tolerance`, inclusive."""
    good = [point for point in points if _loses_at_most(tolerance, point.difference)]
    return min(good, key=lambda point: point.ratio, default=None)


def _loses_at_most(tolerance: float, difference: float) -> bool:
    return difference >= -tolerance - 1e-9


# --- thirds of the inputs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Third:
    """Inputs of similar length: their places, from the shortest to the longest."""

    name: str
    shortest: int
    longest: int
    places: tuple[int, ...]

    @property
    def n(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class InThird:
    """A setting on a third of the inputs.

    Attributes:
        n: Number of inputs.
        layers: Mean layers per token.
        difference: Mean ROUGE-L minus full depth's on the same inputs.
        error: Standard error of `difference`; None for a single input.
        consistency: Mean ROUGE-L against full depth's text.
    """

    n: int
    layers: float
    difference: float
    error: float | None
    consistency: float


@dataclass(frozen=True)
class ByLength:
    """A setting on each third, the shortest first."""

    name: str
    curve: str
    threshold: float
    thirds: tuple[InThird, ...]


def thirds(lengths: Sequence[int]) -> list[Third]:
    """Inputs in three parts by length. Equal lengths stay together, so parts may differ in size or be missing."""
    ordered = sorted(lengths)
    cuts = [ordered[part * len(ordered) // 3] for part in (1, 2)]
    part_of = [sum(length >= cut for cut in cuts) for length in lengths]
    found = []
    for part, name in enumerate(("short", "middle", "long")):
        places = tuple(place for place, own in enumerate(part_of) if own == part)
        if places:
            inside = [lengths[place] for place in places]
            found.append(Third(name, min(inside), max(inside), places))
    return found


def by_length(results: Results, lengths: str, asked: Sequence[str]) -> list[ByLength]:
    """The settings of curves on each third of the inputs, under the rule `"row"`.

    Args:
        lengths: `"source_tokens"` or `"full_depth_tokens"`.
        asked: The curves.
    """
    parts, full = thirds(results["inputs"][lengths]), full_depth(results)["per_input"]
    rows = [one for one in results["quality"].values() if one["curve"] in asked and one["batch_exit"] == "row"]
    return [
        ByLength(
            one["name"],
            one["curve"],
            one["threshold"],
            tuple(_in_third(one["per_input"], full, third.places) for third in parts),
        )
        for one in sorted(rows, key=lambda one: (asked.index(one["curve"]), one["threshold"]))
    ]


def _in_third(own: dict[str, Any], full: dict[str, Any], places: Sequence[int]) -> InThird:
    differences = [own["rougeL"][place] - full["rougeL"][place] for place in places]
    tokens = [own["tokens"][place] for place in places]
    layers = [own["layers"][place] * count for place, count in zip(places, tokens, strict=True)]
    return InThird(
        n=len(places),
        layers=sum(layers) / sum(tokens),
        difference=fmean(differences),
        error=stdev(differences) / math.sqrt(len(places)) if len(places) > 1 else None,
        consistency=fmean(own["consistency"][place] for place in places),
    )


def most_eager(rows: Iterable[ByLength], tolerance: float) -> dict[str, list[float | None]]:
    """For each curve, the lowest threshold that loses at most `tolerance` points on each third; None: none does."""
    by_curve: dict[str, list[ByLength]] = {}
    for row in rows:
        by_curve.setdefault(row.curve, []).append(row)
    return {
        curve: [_lowest(each, part, tolerance) for part in range(len(each[0].thirds))]
        for curve, each in by_curve.items()
    }


def _lowest(rows: Sequence[ByLength], part: int, tolerance: float) -> float | None:
    good = [row.threshold for row in rows if _loses_at_most(tolerance, row.thirds[part].difference)]
    return min(good, default=None)


# --- longest against shortest third ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shifts:
    """Counts of settings that lose notably more on the last third than on the first, notably less, or neither."""

    more: int
    less: int
    even: int

    @property
    def total(self) -> int:
        return self.more + self.less + self.even


def shifts(rows: Iterable[ByLength]) -> Shifts:
    """Count settings by how the loss on the last third differs from the first, beyond noise. Skips missing errors."""
    signs = [_shift(row) for row in rows if len(row.thirds) > 1]
    return Shifts(signs.count(-1), signs.count(1), signs.count(0))


def _shift(row: ByLength) -> int | None:
    """-1 if the last third loses notably more than the first, 1 if notably less, else 0; None if noise is unknown."""
    first, last = row.thirds[0], row.thirds[-1]
    if first.error is None or last.error is None:
        return None
    shift, noise = last.difference - first.difference, NOTABLE * math.hypot(first.error, last.error)
    return (shift > noise) - (shift < -noise)


# --- in words --------------------------------------------------------------------------------------------------------


def batch_reading(found: Sequence[Choice]) -> str:
    """The effect of batch size and rule on the best threshold, in words."""
    rules = dict.fromkeys(one.batch_exit for one in found)
    sentences = [_threshold_sentence(rule, [one for one in found if one.batch_exit == rule]) for rule in rules]
    return " ".join([*sentences, *_rule_sentence(found)])


def _threshold_sentence(rule: str, found: Sequence[Choice]) -> str:
    best: dict[str, set[float | None]] = {}
    for one in found:
        best.setdefault(one.curve, set()).add(one.point.threshold if one.point else None)
    moves, stays = ([curve for curve, own in best.items() if (len(own) > 1) is many] for many in (True, False))
    parts = [f"changes with the batch size for {listed(moves)}"] if moves else []
    parts += [f"is the same at every batch size for {listed(stays)}"] if stays else []
    return f"Under rule {rule} the best threshold {listed(parts)}."


def _rule_sentence(found: Sequence[Choice]) -> list[str]:
    """Which rule is faster where both have a point within the tolerance. At batch size 1 the rules are the same."""
    points = {(one.curve, one.batch_size, one.batch_exit): one.point for one in found if one.batch_size > 1}
    pairs = [
        point.ratio / points[curve, size, "row"].ratio
        for (curve, size, rule), point in points.items()
        if rule == "batch" and point and points.get((curve, size, "row"))
    ]
    if not pairs:
        return []
    faster = sum(pair < 1 for pair in pairs)
    return [
        f"In {faster} of {len(pairs)} pairs of curve and batch size (from 2 on) the best under rule batch is faster "
        f"than the best under row; its time is {median(pairs):.2f} of the other's in the median."
    ]


def length_reading(rows: Sequence[ByLength], what: str) -> str:
    """The effect of long inputs or outputs (`what`), in words."""
    if not rows or len(rows[0].thirds) < 2:
        return f"There are no {what} of different lengths to compare."
    found = shifts(rows)
    first, last = (fmean(row.thirds[part].consistency for row in rows) for part in (0, -1))
    return _layers_sentence(rows, what) + (
        f"Of {found.total} settings, those that lose notably more ROUGE-L on long {what} than on short ones: "
        f"{found.more}; notably less: {found.less}; not to be told apart: {found.even} (by two standard errors, which "
        f"one comparison in twenty exceeds by chance). Consistency with full depth is {first:.1f} on short {what} and "
        f"{last:.1f} on long ones in the mean over the settings."
    )


def _layers_sentence(rows: Sequence[ByLength], what: str) -> str:
    """How many layers tokens run; empty for static decoders, whose depth is fixed."""
    if any(row.curve == STATIC for row in rows):
        return ""
    first, last = (fmean(row.thirds[part].layers for row in rows) for part in (0, -1))
    return f"Tokens run {first:.2f} layers on short {what} and {last:.2f} on long ones in the mean over the settings. "


def listed(words: Iterable[Any]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *most, last = map(str, words)
    return f"{', '.join(most)} and {last}" if most else last
