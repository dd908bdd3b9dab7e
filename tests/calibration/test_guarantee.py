"""With the shipped model's recorded losses as population: how often does a setting chosen on a draw exceed the target?

Losses of all 547 validation inputs, full depth against each setting, as `calibrate_model` records them.
"""

from __future__ import annotations

import csv
import gzip
import math
from pathlib import Path

import numpy as np
import pytest

from hf_earlyexit.calibration import risk_control
from hf_earlyexit.calibration.loss_table import LossTable
from hf_earlyexit.calibration.losses import LOSSES
from hf_earlyexit.calibration.risk_control import calibrate
from hf_earlyexit.calibration.search import pareto_front
from hf_earlyexit.decoding.candidates import Candidate


RECORDED = Path(__file__).parent.parent / "data/shipped-losses.csv.gz"
DRAWS, N, DELTA = 1000, 200, 0.1
MOST_FAILURES = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)


def recorded(loss: str, curve: str) -> np.ndarray:
    """`[547, K]`, conservative to eager."""
    with gzip.open(RECORDED, "rt", newline="") as file:
        header, *rows = csv.reader(file)
    columns = [place for place, name in enumerate(header) if name.rpartition(" ")[0] == f"{loss} {curve}"]
    return np.array(rows, dtype=np.float64)[:, columns]


def chosen_risks(population: np.ndarray, **asked) -> np.ndarray:
    """Population risks of the settings chosen in each draw (with replacement); never exiting has risk 0."""
    generator, risks = np.random.default_rng(0), population.mean(axis=0)
    costs = -np.arange(population.shape[1])
    draws = (population[generator.integers(len(population), size=N)] for _ in range(DRAWS))
    indices = [calibrate(draw, costs, delta=DELTA, **asked).index for draw in draws]
    return np.array([0.0 if index is None else risks[index] for index in indices])


def just_above(population: np.ndarray, target: float) -> float:
    """The hardest target: the risk of the first setting above `target`, minus a small margin."""
    risks = population.mean(axis=0)
    column = int((risks > target).argmax())
    assert risks[column] > target
    return float(risks[column] - 1e-4)


@pytest.fixture
def no_bounds(monkeypatch):
    """Replace upper bounds by 1 (no column passes): tests do not use them, and they take forty times as long."""
    monkeypatch.setattr(risk_control, "upper_bounds_of", lambda losses, **_: np.ones(losses.shape[1]))


CURVES = ("softmax:2,4,6", "classifier")
# Cost of each setting: mean layers per token on all inputs.
LAYERS = {
    "softmax:2,4,6": [7.23, 6.88, 6.32, 5.73, 5.11, 4.64, 4.26, 3.88, 3.44],
    "classifier": [6.22, 5.63, 5.08, 4.67, 4.31, 3.73, 3.19, 2.65, 1.73],
}
TARGETS = {"text_distance": 0.2, "rougeL_drop": 0.02}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("loss", TARGETS)
def test_what_is_chosen_on_a_draw_keeps_the_promise_of_the_documentation(loss, curve, no_bounds):
    risks = chosen_risks(recorded(loss, curve), target=TARGETS[loss], bound="wsr", loss_lower=LOSSES[loss].lower)
    assert (risks > TARGETS[loss]).mean() <= MOST_FAILURES
    assert (risks != 0).mean() > 0.7, "and something is chosen"


@pytest.mark.parametrize(
    ("loss", "method", "bound", "curve"),
    [(loss, "ltt", bound, curve) for loss in TARGETS for bound in ("wsr", "hb") for curve in CURVES]
    # Bounds choose the same as tests on one draw (`test_calibration.py`): here each loss and each curve once.
    + [("text_distance", "ucb", "wsr", "classifier"), ("rougeL_drop", "ucb", "wsr", "softmax:2,4,6")]
    # For signed losses Hoeffding's bound would need thousands of inputs.
    + [("text_distance", "ucb", "hoeffding", curve) for curve in CURVES],
)
def test_the_hardest_promises_are_kept(loss, method, bound, curve, request):
    """The failure rate is at most delta; signed losses are clipped for bounds that get weaker with their range."""
    if method == "ltt":
        request.getfixturevalue("no_bounds")
    if bound == "hb":
        pytest.importorskip("scipy.special")
    population, lower = recorded(loss, curve), LOSSES[loss].lower if bound == "wsr" else 0.0
    target = just_above(population.clip(lower), TARGETS[loss])
    risks = chosen_risks(population.clip(lower), target=target, method=method, bound=bound, loss_lower=lower)
    assert (risks > target).mean() <= MOST_FAILURES


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("loss", TARGETS)
def test_the_mean_risk_of_conformal_risk_control_is_at_most_the_target(loss, curve):
    target = just_above(recorded(loss, curve), TARGETS[loss])
    risks = chosen_risks(recorded(loss, curve), target=target, method="crc", loss_lower=LOSSES[loss].lower)
    assert risks.mean() <= target + 3 * risks.std() / math.sqrt(DRAWS)


@pytest.mark.parametrize("loss", TARGETS)
@pytest.mark.parametrize("hard", [False, True])
def test_an_order_that_is_learned_on_other_inputs_keeps_the_promise(loss, hard, no_bounds):
    """As `calibrate_model` by default: both curves, the Pareto front of a select part, one chain at the full delta."""
    population, lower = np.hstack([recorded(loss, curve) for curve in CURVES]), LOSSES[loss].lower
    candidates = [Candidate(curve, place) for curve in CURVES for place in range(9)]
    costs = dict(zip((one.name for one in candidates), np.concatenate([LAYERS[curve] for curve in CURVES])))
    target = just_above(population, TARGETS[loss]) if hard else TARGETS[loss]
    generator, risks = np.random.default_rng(0), []
    for _ in range(DRAWS):
        select, calibrate_on = (population[generator.integers(len(population), size=n)] for n in (109, 219))
        front = pareto_front(LossTable(candidates, [], select, np.zeros(18)), costs, below=8.0)
        columns = [candidates.index(one) for one in front]
        asked = {"target": target, "delta": DELTA, "loss_lower": lower}
        index = calibrate(calibrate_on[:, columns], [costs[one.name] for one in front], **asked).index
        risks.append(0.0 if index is None else population[:, columns[index]].mean())
    assert (np.array(risks) > target).mean() <= MOST_FAILURES
    assert (np.array(risks) != 0).mean() > 0.7, "and something is chosen"


def test_to_take_what_looks_good_breaks_the_promise():
    """Without a bound, the last setting whose mean loss is at most the target exceeds it in many draws."""
    population = recorded("text_distance", "softmax:2,4,6")
    target, generator, risks = just_above(population, 0.2), np.random.default_rng(0), population.mean(axis=0)
    failures = 0
    for _ in range(DRAWS):
        means = population[generator.integers(len(population), size=N)].mean(axis=0)
        good = int(np.logical_and.accumulate(means <= target).sum())
        failures += good > 0 and risks[good - 1] > target
    assert failures / DRAWS > 3 * MOST_FAILURES
