"""Fixed-sequence tests from several starts: rejections, error rate, and power."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_earlyexit.calibration import fixed_sequence
from hf_earlyexit.calibration.fixed_sequence import rejected
from hf_earlyexit.calibration.risk_control import calibrate, inputs_needed
from tests.scripts import SCRIPTS, run_script


DELTA = 0.1


def random_p_values(seed: int) -> np.ndarray:
    """P-values of some hypotheses: small, large, and exactly at the levels that shares have."""
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 9))
    return generator.choice([0.0, DELTA / 3, DELTA / 2, 0.04, 2 * DELTA / 3, 0.09, DELTA, 0.11, 1.0], size=count)


@pytest.mark.parametrize(
    ("p_values", "starts", "expected"),
    [
        ([0.01, 0.1, 0.2, 0.01], 1, (0, 1)),
        ([0.2, 0.01, 0.01, 0.01], 1, ()),
        ([0.2, 0.01, 0.01, 0.01], 2, (2, 3)),
        ([0.07, 0.01, 0.01, 0.01], 2, (0, 1, 2, 3)),  # the second start's share wraps around
        ([0.01, 0.01, 0.07, 0.2], 2, (0, 1, 2)),  # the first start's share is passed on
        ([0.01, 0.06, 0.01, 0.01], 2, (0, 1, 2, 3)),
        ([0.04, 0.06, 0.2, 0.01], 2, (0,)),
        ([0.01], 3, (0,)),
        ([0.1], 3, (0,)),
        ([], 1, ()),
    ],
)
def test_by_hand(p_values, starts, expected):
    assert rejected(p_values, DELTA, starts) == expected


def one_start_is_the_fixed_sequence() -> None:
    for seed in range(200):
        p_values = random_p_values(seed)
        passed = int(np.logical_and.accumulate(p_values <= DELTA).sum())
        assert fixed_sequence.rejected(p_values.tolist(), DELTA) == tuple(range(passed))


def shares_are_handed_on_as_in_the_graph() -> None:
    """The result equals Bretz's matrix update: weights w, and a graph G where each hypothesis passes all on."""
    for seed in range(200):
        p_values, starts = random_p_values(seed), 1 + seed % 4
        count = len(p_values)
        weights, graph = np.zeros(count), np.roll(np.eye(count), 1, axis=1) if count > 1 else np.zeros((1, 1))
        for number in range(min(starts, count)):
            weights[number * count // min(starts, count)] += 1 / min(starts, count)
        left = set(range(count))
        while able := [one for one in left if weights[one] and p_values[one] <= DELTA * weights[one] * (1 + 1e-12)]:
            one = able[-1]
            left.remove(one)
            old, weights = graph.copy(), weights + weights[one] * graph[one]
            weights[one] = 0
            for row in left:
                for column in left:
                    loop = old[row, one] * old[one, row]
                    reached = (old[row, column] + old[row, one] * old[one, column]) / (1 - loop) if loop < 1 else 0
                    graph[row, column] = reached if row != column else 0
        assert fixed_sequence.rejected(p_values.tolist(), DELTA, starts) == tuple(sorted(set(range(count)) - left))


def test_one_start_is_the_fixed_sequence():
    one_start_is_the_fixed_sequence()


def test_shares_are_handed_on_as_in_the_graph():
    shares_are_handed_on_as_in_the_graph()


def test_mapie_rejects_the_same_from_one_start_and_no_others_from_several():
    """MAPIE does not pass shares on between starts."""
    risk_control = pytest.importorskip("mapie.risk_control")
    more = 0
    for seed in range(200):
        p_values, starts = random_p_values(seed), 1 + seed % 4
        if len(p_values) % starts:  # elsewhere MAPIE spreads starts differently
            continue
        theirs = risk_control.control_fwer(p_values, DELTA, risk_control.FWERFixedSequenceTesting(n_starts=starts))
        ours = rejected(p_values.tolist(), DELTA, starts)
        assert set(theirs.tolist()) <= set(ours)
        assert starts > 1 or theirs.tolist() == list(ours)
        more += len(ours) > len(theirs)
    assert more


@pytest.mark.parametrize("mutation", ("gives all of delta to each", "hands on to all"))
def test_the_laws_notice(mutation, monkeypatch):
    right = fixed_sequence.rejected

    def wrong(p_values, delta, starts=1):
        if mutation == "gives all of delta to each":
            return right(p_values, delta * starts, starts)
        return tuple(place for place, one in enumerate(p_values) if one <= delta / starts)

    monkeypatch.setattr(fixed_sequence, "rejected", wrong)
    with pytest.raises(AssertionError):
        one_start_is_the_fixed_sequence()
        shares_are_handed_on_as_in_the_graph()


# --- tables of losses -----------------------------------------------------------------------------------------------


def table(*risks: float, inputs: int = 400) -> np.ndarray:
    return np.stack([np.arange(inputs) % 100 < 100 * risk for risk in risks], axis=1).astype(float)


def test_a_table_is_tested_from_several_starts():
    losses, costs = table(0.2, 0.02, 0.03, 0.2), [0.9, 0.8, 0.7, 0.6]
    alone = calibrate(losses, costs, target=0.1)
    assert alone.index is None and alone.columns == () and alone.accepted == 0 and alone.starts == 1
    found = calibrate(losses, costs, target=0.1, starts=4)
    assert found.columns == (1, 2) and found.accepted == 2 and found.index == 2 and found.starts == 4
    assert inputs_needed(target=0.1, starts=2) == inputs_needed(target=0.1, delta=0.05) > inputs_needed(target=0.1)
    with pytest.raises(ValueError, match="`starts=2` goes with `method='ltt'`, which tests, not 'ucb'"):
        calibrate(losses, costs, target=0.1, starts=2, method="ucb")
    for starts in (0, 1.5, True):
        with pytest.raises(ValueError, match="`starts` must be a whole number of at least 1"):
            calibrate(losses, costs, target=0.1, starts=starts)


# --- simulation -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulation():
    sys.path.insert(0, str(SCRIPTS))
    import simulate_starts

    return simulate_starts


def keeps_the_rate(simulation, draws: int, orders) -> dict:
    """At most delta plus three standard errors of the draws accept a setting whose risk is too large."""
    most = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / draws)
    found = {}
    for order in orders:
        for starts in simulation.STARTS:
            found[order, starts] = simulation.simulated(order, draws, 219, starts)
            assert found[order, starts].failures <= most, (order, starts)
    return found


def test_the_error_rate_is_kept(simulation):
    found = keeps_the_rate(simulation, 60, ["all are hardly bad", "the first is bad"])
    assert found["the first is bad", 1].something < 0.05 < 0.7 < found["the first is bad", 3].something


@pytest.mark.slow
def test_the_error_rate_is_kept_in_every_order(simulation):
    found = keeps_the_rate(simulation, 1000, simulation.ORDERS)
    assert found["the first is bad", 2].cost < found["the first is bad", 1].cost
    assert found["ascending", 1].cost <= found["ascending", 2].cost + 0.01


def test_the_script_prints_a_table(tmp_path):
    recorded = Path(__file__).parent.parent / "data/shipped-losses.csv.gz"
    for more, orders in (([], 6), (["--losses", str(recorded)], 6 + 2)):
        ran = run_script("simulate_starts.py", "--draws", "2", *more, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        rows = ran.stdout.splitlines()
        assert rows[0].startswith("| order of the risks | starts |") and len(rows) == 2 + orders * 3
