"""Intervals of means match known values, and have the stated coverage."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from hf_earlyexit.evaluation.intervals import mean_interval, ratio_interval


pytest.importorskip("scipy.stats")


def test_of_one_or_of_equal_values_it_is_the_mean():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in ([0.25], [0.25] * 9):
            assert mean_interval(values) == {"mean": 0.25, "low": 0.25, "high": 0.25}


def test_it_is_that_of_the_normal_distribution_for_many_values():
    values = np.random.default_rng(0).random(400)
    found, margin = mean_interval(values), 1.96 * values.std() / 20
    assert found["mean"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - margin, abs=0.004)
    assert found["high"] == pytest.approx(values.mean() + margin, abs=0.004)
    assert mean_interval(list(values)) == found, "the same values, the same interval"


def test_it_covers_the_mean_in_about_95_of_100_draws():
    generator = np.random.default_rng(1)
    found = [mean_interval(generator.beta(2, 6, 60)) for _ in range(200)]
    assert 0.88 < np.mean([one["low"] <= 0.25 <= one["high"] for one in found]) < 0.99


def test_units_are_drawn_not_inputs():
    """Five equal inputs per unit carry no more information than one."""
    values = np.random.default_rng(2).random(40)
    repeated, units = np.repeat(values, 5), [f"text {number}" for number in np.repeat(range(40), 5)]
    of_units, of_inputs = mean_interval(repeated, units), mean_interval(repeated)
    assert of_units == pytest.approx(mean_interval(values))
    assert of_inputs["high"] - of_inputs["low"] < 0.6 * (of_units["high"] - of_units["low"])
    order = np.random.default_rng(3).permutation(200)
    assert mean_interval(repeated[order], [units[place] for place in order])["mean"] == pytest.approx(values.mean())


def test_of_unequal_units_it_is_the_mean_over_inputs():
    found = mean_interval([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert found == {"mean": 0.75, "low": 0.0, "high": 1.0}


def test_of_a_ratio_it_is_about_the_sums():
    tokens = np.array([1] * 30 + [9] * 30)
    layers = tokens * np.array([8] * 30 + [2, 4] * 15)
    found = ratio_interval(layers, tokens)
    assert found["mean"] == layers.sum() / tokens.sum() == 3.5
    assert found["low"] < 3.5 < found["high"] < np.mean(layers / tokens), "which is 5.5"
    assert ratio_interval([4, 8], [1, 2]) == {"mean": 4.0, "low": 4.0, "high": 4.0}
