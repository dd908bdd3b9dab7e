"""Answers to the open questions, on data small enough to check by hand."""

from __future__ import annotations

import pytest

from hf_earlyexit.evaluation.questions import (
    ByLength,
    Choice,
    InThird,
    Shifts,
    batch_reading,
    by_length,
    choices,
    clock,
    curves,
    length_reading,
    listed,
    most_eager,
    shifts,
    thirds,
)


# ROUGE-L of four inputs by setting. The mean of full depth is 70, that of "a 0.5" 68: just within 2 points.
ROUGE = {
    ("full depth", None): [60.0, 70.0, 70.0, 80.0],
    ("static decoder", 2): [50.0, 60.0, 50.0, 40.0],
    ("a", 0.5): [60.0, 69.0, 67.0, 76.0],
    ("a", 0.3): [56.0, 60.0, 60.0, 60.0],
    ("b", 0.9): [60.0, 60.0, 60.0, 60.0],
}


def quality(curve, threshold, rouge, rule="row", **inputs):
    return {
        "name": curve if threshold is None else f"{curve} {threshold:g}",
        "curve": curve,
        "threshold": threshold,
        "batch_exit": rule,
        "scores": {"rougeL": {"mean": sum(rouge) / len(rouge)}},
        "mean_layers": {"mean": 4.5},
        "per_input": {
            "rougeL": rouge,
            "consistency": [90.0, 80.0, 70.0, 60.0],
            "layers": [2.0, 4.0, 6.0, 8.0],
            "tokens": [10, 10, 30, 20],
            **inputs,
        },
    }


def cell(curve, threshold, rule, size, ratio):
    name = curve if threshold is None else f"{curve} {threshold:g}"
    time = {"ratio": {"cpu": {"median": ratio, "iqr": 0.1}, "wall": {"median": 9.0, "iqr": 0.1}}}
    about = {"curve": curve, "threshold": threshold, "batch_exit": rule, "batch_size": size, "name": name}
    return {**about, "quality": name if rule == "row" else f"{name} {rule}", "time": time}


def results(*cells, points=2.0):
    qualities = {}
    for (curve, threshold), rouge in ROUGE.items():
        one = quality(curve, threshold, rouge)
        qualities[one["name"]] = one
    qualities["a 0.3 batch"] = quality("a", 0.3, [60.0, 69.0, 69.0, 79.0], "batch")
    return {
        "asked": {"points": points},
        "quality": qualities,
        "cells": list(cells),
        "inputs": {"source_tokens": [5, 30, 30, 90], "full_depth_tokens": [12, 10, 30, 20]},
    }


# --- batches --------------------------------------------------------------------------------------------------------


def test_the_fastest_cell_that_loses_little_enough_is_chosen():
    found = choices(
        results(cell("a", 0.5, "row", 1, 0.8), cell("a", 0.3, "row", 1, 0.4), cell("b", 0.9, "row", 1, 0.3))
    )
    a, b = found
    assert (a.point.name, a.point.threshold, a.point.ratio) == ("a 0.5", 0.5, 0.8)
    assert a.point.difference == pytest.approx(-2.0) and a.point.spread == pytest.approx(0.04)
    assert b == Choice("b", "row", 1, None)


def test_of_several_good_ones_the_fastest_by_the_cpu_clock_is_chosen():
    cells = [cell("a", 0.5, "row", 1, 0.8), cell("a", 0.3, "row", 1, 0.7), cell("b", 0.9, "row", 1, 0.6)]
    assert [one.point.name for one in choices(results(*cells, points=20.0))] == ["a 0.3", "b 0.9"]


def test_the_clock_is_the_one_that_was_asked_for():
    given = results(cell("a", 0.5, "row", 1, 0.8))
    assert (clock(given), choices(given)[0].point.ratio) == ("cpu", 0.8)
    given["asked"]["clock"] = "wall"
    assert (clock(given), choices(given)[0].point.ratio) == ("wall", 9.0)
    with pytest.raises(ValueError, match="by the clock 'sun', known are cpu, wall"):
        clock({"asked": {"clock": "sun"}})


def test_quality_is_that_of_the_batch_rule():
    found = choices(results(cell("a", 0.3, "batch", 8, 1.2), cell("a", 0.3, "row", 8, 1.0)))
    assert [(one.batch_exit, one.point and one.point.difference) for one in found] == [("row", None), ("batch", -0.75)]


def test_batch_sizes_are_told_apart_and_baselines_are_no_criteria():
    cells = [cell("a", 0.5, "row", size, 0.1 * size) for size in (8, 1)]
    cells += [cell("full depth", None, "row", 1, 0.01), cell("static decoder", 2, "row", 1, 0.01)]
    given = results(*cells)
    assert curves(given) == ["a", "b"]
    assert [(one.batch_size, one.point.ratio) for one in choices(given)] == [(1, 0.1), (8, 0.8)]
    assert choices(given, ["static decoder"]) == [Choice("static decoder", "row", 1, None)]


def test_what_batches_do_is_put_into_words():
    cells = [cell("a", 0.5, "row", 1, 0.5), cell("a", 0.5, "row", 8, 1.0), cell("a", 0.3, "batch", 8, 0.9)]
    cells += [cell("b", 0.9, "row", 1, 0.5), cell("b", 0.9, "row", 8, 0.5), cell("a", 0.3, "row", 8, 0.2)]
    cells += [cell("a", 0.3, "batch", 1, 0.1)]
    assert batch_reading(choices(results(*cells))) == (
        "Under rule row the best threshold is the same at every batch size for a and b. Under rule batch the best "
        "threshold is the same at every batch size for a. In 1 of 1 pairs of curve and batch size (from 2 on) the "
        "best under rule batch is faster than the best under row; its time is 0.90 of the other's in the median."
    )
    moved = batch_reading(choices(results(*cells, points=12.0)))
    assert moved.startswith("Under rule row the best threshold changes with the batch size for a and is the same at")


# --- lengths --------------------------------------------------------------------------------------------------------


def test_thirds_keep_equal_lengths_together():
    assert [(one.name, one.shortest, one.longest, one.places) for one in thirds([9, 1, 5, 4, 2, 8])] == [
        ("short", 1, 2, (1, 4)),
        ("middle", 4, 5, (2, 3)),
        ("long", 8, 9, (0, 5)),
    ]
    assert [(one.name, one.n) for one in thirds([5, 30, 30, 90])] == [("short", 1), ("long", 3)]
    assert [(one.name, one.n) for one in thirds([7, 7, 7])] == [("long", 3)]


def test_a_setting_on_each_third():
    (row,) = by_length(results(), "full_depth_tokens", ["static decoder"])
    assert (row.name, row.threshold, [part.n for part in row.thirds]) == ("static decoder 2", 2, [1, 1, 2])
    short, _, long = row.thirds
    assert short == InThird(1, 4.0, -10.0, None, 80.0)
    # Inputs 3 and 4: 30 tokens at 6 layers and 20 at 8; differences of -20 and -40, standard deviation sqrt(200).
    assert (long.layers, long.difference, long.consistency) == (6.8, -30.0, 65.0)
    assert long.error == pytest.approx(10.0)


def test_only_rows_by_themselves_are_asked_about_lengths_from_eager_to_careful():
    assert [row.name for row in by_length(results(), "source_tokens", ["b", "a"])] == ["b 0.9", "a 0.3", "a 0.5"]


def test_the_most_eager_threshold_is_found_for_each_third():
    rows = by_length(results(), "full_depth_tokens", ["a", "b"])
    # "a 0.3" loses 10, 4 and 15 points on the thirds, "a 0.5" 1, 0 and 3.5, "b 0.9" 10, 0 and 15.
    assert [[part.difference for part in row.thirds] for row in rows] == [[-10, -4, -15], [-1, 0, -3.5], [-10, 0, -15]]
    assert most_eager(rows, 2.0) == {"a": [0.5, 0.5, None], "b": [None, 0.9, None]}
    assert most_eager(rows, 4.0) == {"a": [0.5, 0.3, 0.5], "b": [None, 0.9, None]}


def row(first: tuple[float, float | None], last: tuple[float, float | None], curve: str = "a") -> ByLength:
    parts = [InThird(9, 3.0 + place, mean, error, 90.0 - place) for place, (mean, error) in enumerate((first, last))]
    return ByLength("a 0.5", curve, 0.5, tuple(parts))


def test_only_what_is_beyond_noise_counts_as_a_shift():
    # The error of the difference is hypot(3, 4) = 5, so a shift must exceed 10 points.
    rows = [row((0, 3), (-11, 4)), row((0, 3), (11, 4)), row((0, 3), (-9, 4)), row((0, None), (-99, 4))]
    assert shifts(rows) == Shifts(more=1, less=1, even=1)
    assert shifts([ByLength("a 0.5", "a", 0.5, (InThird(9, 3.0, 0.0, 1.0, 90.0),))]).total == 0


def test_what_lengths_do_is_put_into_words():
    text = length_reading([row((0, 3), (-11, 4))], "inputs")
    assert text.startswith(
        "Tokens run 3.00 layers on short inputs and 4.00 on long ones in the mean over the settings."
    )
    assert "Of 1 settings, those that lose notably more ROUGE-L on long inputs than on short ones: 1; " in text
    assert text.endswith("is 90.0 on short inputs and 89.0 on long ones in the mean over the settings.")
    assert length_reading([row((0, 3), (-11, 4), "static decoder")], "outputs").startswith("Of 1 settings")
    assert length_reading([], "inputs") == "There are no inputs of different lengths to compare."


def test_lists_read_like_text():
    assert [listed("a"), listed("ab"), listed([1, 2, 3])] == ["a", "a and b", "1, 2 and 3"]
