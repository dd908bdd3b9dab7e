"""Unit tests of criteria, schedules and batch rules."""

from __future__ import annotations

import math

import pytest
import torch

from hf_earlyexit import ExitPoint
from hf_earlyexit.exits.criteria import BATCH_RULES, CRITERIA, SCHEDULES, CalmDecay, CalmReleasedDecay, FixedLayer


def point(layer=2, logits=None, hidden=None, previous=None, probability=None) -> ExitPoint:
    hidden = torch.randn(2, 4) if hidden is None else hidden
    previous = torch.randn(2, 4) if previous is None else previous
    return ExitPoint(
        layer, [0, 1], [5, 5], hidden, previous, lambda at, states: logits, lambda at, states: probability
    )


LOGITS = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]]).log() + 3.0
ENTROPIES = [-(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))]
ENTROPIES += [-(0.8 * math.log(0.4) + 0.2 * math.log(0.2))]


@pytest.mark.parametrize(
    "criterion, seen, expected",
    [
        ("softmax", {"logits": LOGITS}, [0.5, 0.0]),
        ("softmax", {"logits": LOGITS.to(torch.bfloat16)}, [0.5, 0.0]),
        ("max_prob", {"logits": LOGITS}, [0.7, 0.4]),
        ("entropy", {"logits": LOGITS}, [1 - entropy / math.log(3) for entropy in ENTROPIES]),
        ("entropy", {"logits": torch.zeros(2, 3)}, [0.0, 0.0]),
        ("state", {"hidden": torch.eye(2), "previous": torch.tensor([[3.0, 4.0], [0.0, -1.0]])}, [0.6, 0.0]),
        ("state", {"layer": 1, "hidden": torch.eye(2), "previous": torch.eye(2)}, [0.0, 0.0]),
        ("classifier", {"probability": torch.tensor([0.25, 0.75])}, [0.25, 0.75]),
        ("patience", {"logits": LOGITS}, [0.0, 0.0]),
    ],
)
def test_confidence(criterion, seen, expected):
    confidence = CRITERIA[criterion]().confidence(point(**seen))
    tolerance = 2e-2 if seen.get("logits", LOGITS).dtype == torch.bfloat16 else 1e-6
    dtype = torch.float64 if criterion == "patience" else torch.float32
    torch.testing.assert_close(confidence, torch.tensor(expected, dtype=dtype), atol=tolerance, rtol=0)


def test_every_criterion_keeps_within_bounds_and_agrees_with_its_row_alone():
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64) * 9  # noqa: E731
    logits, hidden, previous = make(2, 50), make(2, 8), make(2, 8)
    for name, criterion in CRITERIA.items():
        criterion = criterion(2) if name == "fixed" else criterion()
        kwargs = {"logits": logits, "hidden": hidden, "previous": previous, "probability": torch.rand(2)}
        both = criterion.confidence(point(**kwargs))
        assert both.shape == (2,) and (0 <= both).all() and (both <= 1).all()
        for row in range(2):
            one = {key: value[row : row + 1] for key, value in kwargs.items()}
            alone = ExitPoint(
                2, [0], [5], one["hidden"], one["previous"], lambda *_: one["logits"], lambda *_: one["probability"]
            )
            torch.testing.assert_close(criterion.confidence(alone)[0], both[row])


def test_fixed_is_sure_from_its_layer_on():
    assert [FixedLayer(3).confidence(point(layer)).tolist() for layer in (2, 3, 4)] == [[0, 0], [1, 1], [1, 1]]


def test_scores_are_computed_once_and_only_when_looked_at():
    calls = []
    seen = ExitPoint(
        2, [0], [0], torch.ones(1, 4), torch.ones(1, 4), lambda *a: calls.append(a) or LOGITS[:1], lambda *a: None
    )
    CRITERIA["state"]().confidence(seen)
    assert calls == [] and seen.scored is None
    CRITERIA["softmax"]().confidence(seen)
    CRITERIA["entropy"]().confidence(seen)
    assert len(calls) == 1 and seen.scored is seen.logits


def test_calm_schedules_follow_their_formulas():
    """Values of the paper's curve and of the released code's curve at threshold 0.8, tau 4."""
    paper, code = CalmDecay(0.8), CalmReleasedDecay(0.8)
    assert paper.threshold_at(0, 100) == pytest.approx(0.82)
    assert paper.threshold_at(100, 100) == pytest.approx(0.72 + 0.1 * math.exp(-4))
    assert code.threshold_at(0, 100) == pytest.approx(0.8)
    assert code.threshold_at(100, 100) == pytest.approx(0.72 + 0.08 * math.exp(-4))
    assert CalmDecay(1.0).threshold_at(0, 10) == 1.0 and CalmDecay(0.95, tau=0).threshold_at(9, 10) == pytest.approx(
        0.955
    )
    for schedule in SCHEDULES.values():
        thresholds = [schedule(0.6).threshold_at(token, 20) for token in range(21)]
        assert thresholds == sorted(thresholds, reverse=True)


def test_batch_rules():
    rules = {name: rule([True, False], [True, True]) for name, rule in BATCH_RULES.items()}
    assert rules == {"row": [True, False], "batch": [True, True], "batch_joint": [False, False]}
    rules = {name: rule([True, True], [True, True]) for name, rule in BATCH_RULES.items()}
    assert rules == dict.fromkeys(BATCH_RULES, [True, True])
    rules = {name: rule([False, True], [False, True]) for name, rule in BATCH_RULES.items()}
    assert rules == {"row": [False, True], "batch": [False, False], "batch_joint": [False, False]}
