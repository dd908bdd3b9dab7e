"""Candidate settings: their names, their order and their keywords of `generate`."""

from __future__ import annotations

import pytest

from hf_earlyexit import ClassifierConfig, EarlyExitConfig
from hf_earlyexit.decoding.candidates import (
    CURVES,
    FULL_DEPTH,
    STATIC,
    Candidate,
    check_candidates,
    curve_candidates,
    default_curves,
    full_depth,
    static_decoders,
)


BUILT = EarlyExitConfig(exit_layers=(2, 4), classifier=ClassifierConfig()).for_layers(6)


def test_names_and_keywords():
    assert (full_depth().name, full_depth().keywords) == (FULL_DEPTH, {"early_exit": False})
    statics = static_decoders([2, 4])
    assert [one.name for one in statics] == ["static decoder 2", "static decoder 4"]
    assert [one.keywords for one in statics] == [{"exit_criterion": "fixed", "exit_layer": layer} for layer in (2, 4)]
    assert {one.curve for one in statics} == {STATIC}
    (one,) = curve_candidates("state", [0.95], batch_exit="batch")
    assert one == Candidate("state", 0.95, {"exit_criterion": "state", "exit_threshold": 0.95, "batch_exit": "batch"})
    (one,) = curve_candidates("softmax:2,4", [0.5])
    assert one.name == "softmax:2,4 0.5" and one.curve == "softmax:2,4"
    assert one.keywords == {"exit_criterion": "softmax", "exit_threshold": 0.5, "exit_layers": [2, 4]}


def test_exit_candidates_are_for_criteria_that_have_them():
    shared = {"exit_candidates": 8, "batch_exit": "batch"}
    for curve, has in (
        ("softmax:2", True),
        ("entropy", True),
        ("max_prob", True),
        ("patience", True),
        ("state:2", False),
    ):
        (one,) = curve_candidates(curve, [0.5], **shared)
        assert one.keywords.get("exit_candidates") == (8 if has else None) and one.keywords["batch_exit"] == "batch"
    assert shared["exit_candidates"] == 8
    with pytest.raises(ValueError, match="`exit_candidates=98` is more than the vocabulary"):
        check_candidates(curve_candidates("softmax", [0.5], exit_candidates=98), BUILT, 6, 97)


def test_curves_go_from_conservative_to_eager():
    found = curve_candidates("softmax", [0.5, 0.95, 1, 0.8, 0.5])
    assert [one.threshold for one in found] == [1, 0.95, 0.8, 0.5], "each once"


def test_thresholds_that_would_share_a_name_are_refused():
    """Names must be unique, since they identify entries of a journal and columns of a table."""
    assert [one.name for one in curve_candidates("state", [0.99999, 0.999991])] == ["state 0.999991", "state 0.99999"]
    with pytest.raises(ValueError, match="0.9999999 and 0.9999998 of the curve 'state' are both written 1: leave one"):
        curve_candidates("state", [0.9999998, 0.5, 0.9999999])


@pytest.mark.parametrize(
    ("curve", "thresholds", "message"),
    (
        ("softmax", [], "'softmax' has no threshold"),
        ("softmax:two", [0.5], "'softmax:two' must be a criterion, or one and exit points"),
        ("softmax:2;4", [0.5], "'softmax:2;4' must be"),
    ),
)
def test_what_is_no_curve(curve, thresholds, message):
    with pytest.raises(ValueError, match=message):
        curve_candidates(curve, thresholds)


@pytest.mark.parametrize(
    ("candidates", "message"),
    (
        (curve_candidates("softmx", [0.5]), "got 'softmx'"),
        (curve_candidates("softmax", [1.5]), r"must be a number in \[0, 1\], got 1.5"),
        (curve_candidates("softmax:2,3", [0.5]), r"has \[3\], which are no exit points"),
        (curve_candidates("softmax:4,2", [0.5]), "must ascend"),
        (curve_candidates("softmax", [0.5], batch_exit="rows"), "batch_exit"),
        (curve_candidates("classifier", [0.5]), "untrained"),
        (static_decoders([3]), "`exit_layer=3` is not an exit point"),
    ),
)
def test_candidates_are_checked_against_the_model(candidates, message):
    good = [full_depth(), *static_decoders([2, 4, 6]), *curve_candidates("softmax:4", [0.0, 1.0])]
    check_candidates(good, BUILT, 6)
    with pytest.raises(ValueError, match=message):
        check_candidates([*good, *candidates], BUILT, 6)


def test_the_classifiers_curve_is_for_trained_ones():
    kinds = {None: None, "untrained": ClassifierConfig(), "trained": ClassifierConfig(trained=True)}
    found = {name: default_curves(EarlyExitConfig(classifier=kind)) for name, kind in kinds.items()}
    assert list(found[None]) == list(found["untrained"]) == ["softmax", "state"]
    assert found["trained"] == CURVES and list(CURVES) == ["softmax", "state", "classifier"]
