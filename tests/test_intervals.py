"""Intervals of means: by hand where they are known, and that they hold what they say."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from hf_earlyexit.intervals import mean_interval


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
