"""Fitted thresholds lie between observed confidences, so that exits do not depend on rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from hf_earlyexit.evaluation import oracle_curves
from hf_earlyexit.exits import accuracy_thresholds, separating
from hf_earlyexit.exits.accuracy_thresholds import fit_accuracy
from hf_earlyexit.exits.criteria import SoftmaxResponse
from hf_earlyexit.exits.separating import EQUALLY_SURE, separating_thresholds
from tests import watching
from tests.evaluation.test_oracle_curves import made
from tests.tiny import tiny_inputs, tiny_pair


ROUNDING = EQUALLY_SURE / 10


def rounded_otherwise(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """The same confidences, rounded as by other kernels."""
    return values + ROUNDING * np.random.default_rng(seed).uniform(-1, 1, values.shape)


def test_by_hand():
    places, thresholds = separating_thresholds(np.array([0.2, 0.2, 0.4, 1.0]))
    assert places.tolist() == [0, 2, 3] and thresholds.tolist() == pytest.approx([0.1, 0.3, 0.7])
    assert separating_thresholds(np.array([0.0, 0.5]))[1].tolist() == [0.0, 0.25]
    assert separating_thresholds(np.array([0.6, 0.8]))[1].tolist() == pytest.approx([0.5, 0.7])
    assert separating_thresholds(np.array([EQUALLY_SURE / 2, 0.5]))[1][0] == 0.0, "0, rounded differently"
    assert separating_thresholds(np.array([0.5]))[1].tolist() == [0.5 - EQUALLY_SURE]
    near = np.array([0.5, 0.5 + EQUALLY_SURE / 2, 0.7])
    assert separating_thresholds(near)[0].tolist() == [0, 2], "the same token twice"


@given(some.lists(some.floats(0, 1), min_size=1, max_size=40))
def test_each_threshold_separates(values):
    values = np.sort(np.array(values))
    places, thresholds = separating_thresholds(values)
    assert places[0] == 0 and (np.diff(places) > 0).all() and (np.diff(thresholds) > 0).all()
    for place, threshold in zip(places, thresholds):
        assert (values[place:] >= threshold).all() and (values[:place] < threshold).all()
    for start, stop in zip(places, (*places[1:], len(values))):
        assert values[stop - 1] - values[start] <= EQUALLY_SURE


# --- the law, for everything that fits a threshold to confidences ---------------------------------------------------


def accuracies_do_not_depend_on_rounding():
    """The same tokens exit at a fitted threshold after all confidences are rounded differently, and confidences that
    occur twice, as for a repeated input, exit together."""
    generator = np.random.default_rng(0)
    once = generator.uniform(0.05, 0.95, 300)
    sure = np.concatenate([once, rounded_otherwise(once, 1)])
    right = np.tile(generator.random(300) < once, 2)
    table = fit_accuracy("softmax", {1: sure}, {1: right}, least_tokens=5).tables[0]
    assert len(table.confidences) > 10
    for threshold in table.confidences:
        leave = sure >= threshold
        assert (leave[:300] == leave[300:]).all()
        assert (leave == (rounded_otherwise(sure, 2) >= threshold)).all()


def swept_points_do_not_depend_on_rounding():
    rows = np.random.default_rng(0).uniform(0.05, 0.95, (6, 3))
    forced = made(confidences={"c": torch.from_numpy(rows)})
    other = made(confidences={"c": torch.from_numpy(rounded_otherwise(rows))})
    thresholds = oracle_curves.swept_thresholds(forced, "c")
    assert len(thresholds) == 18
    assert oracle_curves.criterion_points(forced, "c", thresholds) == oracle_curves.criterion_points(
        other, "c", thresholds
    )


def thresholds_of_tests_do_not_depend_on_rounding():
    _, model = tiny_pair("tied", 0)
    recordings = []

    class Kept(watching.Recording):
        def __init__(self, *args):
            super().__init__(*args)
            recordings.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watching, "Recording", Kept)
        for quantile in (0.0, 0.5, 0.7, 1.0):
            threshold = watching.threshold_for(model, tiny_inputs(3), SoftmaxResponse(), quantile, max_new_tokens=6)
            seen = np.array(list(recordings[-1].seen.values()))
            assert len(seen) > 10 and np.abs(seen - threshold).min() > ROUNDING


LAWS = [
    accuracies_do_not_depend_on_rounding,
    swept_points_do_not_depend_on_rounding,
    thresholds_of_tests_do_not_depend_on_rounding,
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_fitted_thresholds_do_not_depend_on_rounding(law):
    law()


def on_the_values(values):
    """Thresholds without separation: every distinct value is its own threshold."""
    distinct, places = np.unique(values, return_index=True)
    return places, distinct


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_thresholds_on_observed_values_are_noticed(law, monkeypatch):
    for module in (separating, accuracy_thresholds, oracle_curves, watching):
        monkeypatch.setattr(module, "separating_thresholds", on_the_values)
    with pytest.raises(AssertionError):
        law()
