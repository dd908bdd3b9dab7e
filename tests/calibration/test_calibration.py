"""Bounds against closed forms and hand-computed values, and guarantees against draws from known risks."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from hf_earlyexit.calibration import risk_control
from hf_earlyexit.calibration.bounds import BOUNDS, betting, hoeffding, p_values_of, upper_bounds_of
from hf_earlyexit.calibration.risk_control import Calibration, calibrate, inputs_needed, split_delta


DRAWS = 1000
DELTA = 0.1
# Largest accepted share of failures of a guarantee in that many draws: delta plus three standard errors.
MOST_FAILURES = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)
ANY_LOSS = [bound for bound in BOUNDS if bound != "clopper_pearson"]


def needs(bound: str):
    if bound in ("hb", "clopper_pearson"):
        pytest.importorskip("scipy.special")


def chosen(losses, costs=None, **asked) -> Calibration:
    """`calibrate` with descending costs by default."""
    costs = -np.arange(np.shape(losses)[1]) if costs is None else costs
    return calibrate(losses, costs, **{"target": 0.1, "delta": DELTA, "bound": "wsr"} | asked)


def coins(n: int, risks, seed: int = 0) -> np.ndarray:
    """`[n, len(risks)]` of independent 0/1 losses."""
    return (np.random.default_rng(seed).random((n, len(risks))) < np.asarray(risks)).astype(float)


def table_of(*ones: int, n: int = 100) -> np.ndarray:
    """`[n, len(ones)]`, one column per given number of ones."""
    return (np.arange(n)[:, None] < np.array(ones)).astype(float)


# Bounds


def test_hoeffding_by_hand():
    p_values = hoeffding(np.array([0.0, 5.0, 10.0, 50.0]), 100, 0.1)
    expected = [math.exp(-2 * 100 * 0.1**2), math.exp(-2 * 100 * 0.05**2), 1.0, 1.0]
    np.testing.assert_allclose(p_values, expected)
    result = chosen(table_of(5, 90, n=1000), bound="hoeffding")
    margin = math.sqrt(math.log(1 / DELTA) / 2000)
    np.testing.assert_allclose(result.upper_bounds, [0.005 + margin, 0.09 + margin], atol=1e-9)


def test_hoeffding_bentkus_by_hand():
    """The p-value matches values computed by hand.

    At zero loss both parts are powers of 1 - risk. For 2 losses in 4 and risk 3/4, Hoeffding's is (3/2)^2 (1/2)^2 =
    9/16. A total of 2.9 in 20 counts as 3 for Bentkus, whose p-value is the smaller one at risk 1/2.
    """
    pytest.importorskip("scipy.special")
    p = lambda total, n, risk: p_values_of(np.full((n, 1), total / n), risk, bound="hb", delta=DELTA)[0]  # noqa: E731
    assert p(0, 20, 0.1) == pytest.approx(0.9**20)
    assert p(2, 4, 0.75) == pytest.approx(9 / 16)
    assert p(2.9, 20, 0.5) == pytest.approx(math.e * (1 + 20 + 190 + 1140) / 2**20)
    assert p(5, 10, 0.5) == p(6, 10, 0.5) == 1


def test_hoeffding_bentkus_as_mapie_has_it():
    oracle = pytest.importorskip("mapie.risk_control.methods").compute_hoeffding_bentkus_p_value
    losses = np.random.default_rng(0).beta(0.5, np.geomspace(0.5, 50, 20), (300, 20))
    for risk in (0.02, 0.1, 0.4):
        expected = oracle(losses.mean(axis=0), len(losses), risk)[:, 0]
        np.testing.assert_allclose(p_values_of(losses, risk, bound="hb", delta=DELTA), expected, rtol=1e-9)


def test_the_walk_as_mapie_has_it():
    control = pytest.importorskip("mapie.risk_control").control_fwer
    accepted = []
    for seed in range(20):
        result = chosen(coins(200, np.linspace(0.01, 0.2, 12), seed), bound="hoeffding", target=0.2)
        expected = control(np.array(result.p_values), DELTA, fwer_method="fixed_sequence")
        np.testing.assert_array_equal(np.arange(result.accepted), expected)
        accepted.append(result.accepted)
    assert len(set(accepted)) > 2


def test_clopper_pearson_in_closed_form():
    """The bound is 1 - delta^(1/n) without losses, 1 with losses of 1 only, and a quantile of the beta in between."""
    beta = pytest.importorskip("scipy.stats").beta
    result = chosen(table_of(0, 1, 7, 99, 100), bound="clopper_pearson", delta=0.05)
    expected = [1 - 0.05 ** (1 / 100), *beta.ppf(0.95, [2, 8, 100], [99, 93, 1]), 1.0]
    np.testing.assert_allclose(result.upper_bounds, expected, atol=1e-9)
    one_of_three = p_values_of(table_of(1, n=3), 0.2, bound="clopper_pearson", delta=DELTA)
    assert one_of_three[0] == pytest.approx(0.8**3 + 3 * 0.2 * 0.8**2)


def test_betting_by_hand():
    """With three rows and this delta the bets are sqrt(.25), sqrt(.4) and, as variances fall, sqrt(.6).

    At a risk of 1/2 each bet wins or loses a quarter of itself or, in the first row, half.
    """
    losses = np.array([[0.0, 0.0, 0.5], [0.25, 0.25, 0.75], [0.75, 0.25, 0.25]])
    twice = 1.25 * (1 + math.sqrt(0.4) / 4)
    expected = [1 / twice, 1 / (twice * (1 + math.sqrt(0.6) / 4)), 1.0]  # the first peaks before its last row
    np.testing.assert_allclose(betting(losses, 0.5, math.exp(-3 / 32)), expected)


def test_no_bet_risks_all():
    """Bets above 3 are cut to 0.9 / (1 - 0.5): they win 90% at zero loss and leave a tenth at a loss of 1."""
    assert betting(np.array([[0.0], [0.5]]), 0.5, 0.1)[0] == pytest.approx(1 / 1.9)
    assert betting(np.eye(1, 6).T, 0.5, 1e-9)[0] == pytest.approx(1 / (0.1 * 1.9**5))


def test_early_luck_proves_nothing_about_a_column_that_is_no_better():
    lucky = np.vstack([np.zeros((60, 1)), np.ones((60, 1))])
    assert betting(lucky, 0.4, DELTA)[0] == 1 and betting(lucky[:90], 0.4, DELTA)[0] < 0.01


@pytest.mark.parametrize("bound", BOUNDS)
def test_p_values_fall_with_the_risk_and_rise_with_losses(bound):
    needs(bound)
    losses = np.sort(coins(150, np.full(12, 0.1)), axis=1)  # no loss falls from one column to the next
    risks = np.linspace(0.01, 0.99, 60)
    p_values = np.array([p_values_of(losses, risk, bound=bound, delta=DELTA) for risk in risks])
    assert (np.diff(p_values, axis=0) <= 1e-12).all() and (0 <= p_values).all() and (p_values <= 1).all()
    assert (p_values[0] > 0.1).all() and (p_values[-1] < 1e-4).all()
    if bound != "wsr":  # its bets also depend on the order
        assert (np.diff(p_values, axis=1) >= -1e-12).all()
        assert (np.diff(upper_bounds_of(losses, bound=bound, delta=DELTA)) >= 0).all()


@pytest.mark.parametrize("bound", BOUNDS)
def test_upper_bounds_are_where_p_values_cross_delta(bound):
    needs(bound)
    losses = coins(200, [0.02, 0.1, 0.5, 0.9])
    for delta in (0.05, 0.2):
        bounds = upper_bounds_of(losses, bound=bound, delta=delta)
        assert (losses.mean(axis=0) < bounds).all() and (bounds < 1).all()
        assert (p_values_of(losses, bounds, bound=bound, delta=delta) <= delta).all()
        assert (p_values_of(losses, bounds - 1e-9, bound=bound, delta=delta) > delta).all()


@pytest.mark.parametrize("bound", BOUNDS)
def test_testing_and_bounding_choose_alike(bound):
    needs(bound)
    risks = np.linspace(0.01, 0.3, 12)
    tables = [coins(300, risks, seed) for seed in range(20)]
    both = [[chosen(losses, bound=bound, method=method) for method in ("ltt", "ucb")] for losses in tables]
    assert all(one.accepted == other.accepted and one.p_values == other.p_values for one, other in both)
    assert len({one.accepted for one, _ in both}) > 1


@pytest.mark.parametrize("n", [100, 500])
def test_betting_is_the_more_eager_on_losses_that_vary_little(n):
    pytest.importorskip("scipy.special")
    means = np.linspace(0.02, 0.14, 13)
    accepted = []
    for seed in range(20):
        losses = np.random.default_rng(seed).beta(50 * means, 50 * (1 - means), (n, 13))
        accepted.append([chosen(losses, bound=bound, target=0.15).accepted for bound in ("wsr", "hb")])
    wsr, hb = np.transpose(accepted)
    assert (wsr >= hb).all() and wsr.mean() > hb.mean() + 1


# Guarantees against draws from known risks


def scaled_coins(generator, n, low, high, risk):
    """Losses of `high` or 0; if signed, also `low` with probability 0.1."""
    wins = 0.1 if low < 0 else 0.0
    losses = generator.random((n, DRAWS))
    chance = (risk - low * wins) / high
    return np.where(losses < chance, high, np.where(losses > 1 - wins, low, 0.0))


def scaled_beta(generator, n, low, high, risk):
    mean = (risk - low) / (high - low)
    return low + (high - low) * generator.beta(2 * mean, 2 * (1 - mean), (n, DRAWS))


DRAWN = [(draw, *limits) for draw in (scaled_coins, scaled_beta) for limits in ((0.0, 1.0), (0.0, 3.0), (-1.0, 1.0))]


@pytest.mark.parametrize(
    ("bound", "draw", "low", "high"),
    # Clopper-Pearson is for losses of 0 and 1.
    [(bound, *drawn) for bound in BOUNDS for drawn in (DRAWN[:1] if bound == "clopper_pearson" else DRAWN)],
)
def test_risks_just_above_the_target_are_seldom_accepted(bound, draw, low, high):
    """Over draws (the columns), a risk just above the target is accepted with a rate of at most delta."""
    needs(bound)
    target = 0.15 * (high - low)
    losses = draw(np.random.default_rng(1), 120, low, high, target + 1e-4)
    result = chosen(losses, target=target, bound=bound, loss_lower=low, loss_upper=high)
    assert (np.array(result.p_values) <= DELTA).mean() <= MOST_FAILURES
    assert (np.array(result.upper_bounds) <= target).mean() <= MOST_FAILURES
    assert losses.mean() == pytest.approx(target, abs=0.01 * (high - low))


def test_sorted_rows_do_betting_no_harm(monkeypatch):
    """Over tables and shuffles the guarantee holds for sorted rows; unshuffled, nearly all would be accepted."""
    accepted = []
    tables = np.sort(scaled_beta(np.random.default_rng(2), 60, 0.0, 1.0, 0.201), axis=0)
    for seed in range(DRAWS):
        monkeypatch.setattr(risk_control, "SHUFFLE_SEED", seed)
        accepted.append(chosen(tables[:, [seed]], target=0.2).accepted)
    assert np.mean(accepted) <= MOST_FAILURES
    ahead = tables[:, tables.mean(axis=0) < 0.2]
    assert (betting(ahead, 0.2, DELTA) <= DELTA).mean() > 0.9


@pytest.mark.parametrize(("method", "bound"), [("ltt", "clopper_pearson"), ("ucb", "hb"), ("ltt", "wsr")])
def test_walking_the_columns_costs_no_more_than_testing_one(method, bound):
    """After one safe column come ten just unsafe ones: accepting any that passes would fail in half of the draws."""
    needs(bound)
    risks = np.array([0.02] + [0.101] * 10)
    results = [chosen(coins(80, risks, seed), method=method, bound=bound) for seed in range(DRAWS)]
    assert np.mean([result.accepted > 1 for result in results]) <= MOST_FAILURES
    any_passes = np.mean([min(result.p_values[1:]) <= DELTA for result in results])
    assert any_passes > 2 * MOST_FAILURES  # so the walk gives the protection
    assert np.mean([result.accepted >= 1 for result in results]) > 0.8


def mean_and_error(values) -> tuple[float, float]:
    return np.mean(values), np.std(values) / math.sqrt(len(values))


def test_conformal_risk_control_keeps_the_mean_and_wastes_little():
    """With monotone losses (thresholds on one uniform per input) the mean is within 2 / (n + 1) of the target."""
    risks, n, target = np.linspace(0.005, 0.5, 100), 60, 0.1
    uniforms = np.random.default_rng(0).random((DRAWS, n, 1))
    indices = [chosen(one < risks, method="crc", target=target).index for one in uniforms]
    mean, error = mean_and_error([0.0 if index is None else risks[index] for index in indices])
    assert target - 2 / (n + 1) - 0.005 - 3 * error <= mean <= target + 3 * error


def test_conformal_risk_control_keeps_the_mean_of_signed_losses():
    """Losses of 1 or -1, 1 slightly more often: counting the negative ones would accept the column too often."""
    n, target, chance = 99, 0.01, 0.54
    losses = np.where(np.random.default_rng(0).random((DRAWS, n, 1)) < chance, 1.0, -1.0)
    ask = {"method": "crc", "target": target, "loss_lower": -1.0}
    mean, error = mean_and_error([0.0 if chosen(one, **ask).index is None else 2 * chance - 1 for one in losses])
    assert mean <= target + 3 * error
    credited, error = mean_and_error((2 * chance - 1) * ((losses.sum(axis=1) + 1) / (n + 1) <= target))
    assert credited > target + 3 * error


def test_conformal_risk_control_by_hand():
    """The first of 4 inputs has a loss at the first candidate, the second at the second: both count at the third."""
    losses = [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0], [0, 0, -0.5]]
    result = chosen(losses, method="crc", target=0.35, loss_lower=-1)
    assert result.upper_bounds == (pytest.approx(1.5 / 5), pytest.approx(2 / 5), pytest.approx(2 / 5))
    assert result.means == (0.125, 0.125, -0.125)
    assert (result.index, result.accepted) == (0, 1)
    assert (result.p_values, result.delta, result.bound, result.method) == (None, None, None, "crc")
    assert chosen(losses, method="crc", target=0.4, loss_lower=-1, bound="clopper_pearson").index == 2  # bound unused


# Choices


def test_the_walk_ends_before_the_first_that_fails():
    result = chosen(table_of(0, 2, 60, 0), bound="hoeffding", target=0.2)
    assert (result.index, result.accepted) == (1, 2)
    assert result.p_values[3] == result.p_values[0] < DELTA < result.p_values[2]
    assert chosen(table_of(60, 0, 0), bound="hoeffding", target=0.2).index is None


@pytest.mark.parametrize(
    ("costs", "index"),
    [([4, 3, 2, 1], 2), ([1, 3, 2, 0], 0), ([3, 1, 2, 0], 1), ([4, 2, 2, 1], 1), ([5, 5, 5, 5], 0), ([9, 8, 9, 9], 1)],
)
@pytest.mark.parametrize("method", ["ltt", "ucb", "crc"])
def test_the_cheapest_of_the_accepted_is_chosen_and_of_equals_the_most_conservative(costs, index, method):
    result = chosen(table_of(0, 1, 1, 60), costs, method=method, target=0.2)
    assert (result.index, result.accepted) == (index, 3)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("method", ["ltt", "ucb", "crc"])
def test_tables_at_the_edges(bound, method):
    needs(bound)
    ask = {"bound": bound, "method": method}
    n = inputs_needed(target=0.1, delta=DELTA, **ask)
    assert chosen(np.zeros((n, 1), dtype=bool), **ask).index == 0
    assert chosen(np.zeros((n, 3)), **ask).index == 2
    lost = chosen(np.ones((n, 2)), **ask)
    assert lost.index is None and lost.accepted == 0 and lost.means == lost.upper_bounds == (1.0, 1.0)
    assert lost.p_values == (None if method == "crc" else (1.0, 1.0))
    one = {"target": 0.97, "delta": 0.3} | ask
    assert chosen([[0]], **one).index == 0 and chosen([[1]], **one).index is None


def test_what_was_asked_is_kept_and_results_compare():
    losses = table_of(1, 30)
    result = chosen(losses, target=0.2, delta=0.05, method="ucb", loss_lower=-1, loss_upper=2)
    assert (result.target, result.delta, result.method, result.bound) == (0.2, 0.05, "ucb", "wsr")
    assert (result.n, result.loss_lower, result.loss_upper) == (100, -1, 2)
    assert result.means == (0.01, 0.3)
    assert result == chosen(losses, target=0.2, delta=0.05, method="ucb", loss_lower=-1, loss_upper=2)


@pytest.mark.parametrize("bound", ANY_LOSS)
def test_other_units_change_nothing(bound):
    needs(bound)
    losses = np.random.default_rng(0).beta(0.5, np.linspace(20, 1, 8), (300, 8))
    unit = chosen(losses, bound=bound, target=0.3)
    assert unit.index is not None
    for low in (0.0, -0.4):
        scaled = {"target": 4 * 0.3 + low, "loss_lower": low, "loss_upper": 4 + low}
        other = chosen(4 * losses + low, bound=bound, **scaled)
        assert (other.index, other.accepted) == (unit.index, unit.accepted)
        np.testing.assert_allclose(other.p_values, unit.p_values, rtol=1e-6)
        np.testing.assert_allclose(other.upper_bounds, 4 * np.array(unit.upper_bounds) + low, rtol=1e-6)


def test_the_limits_of_signed_losses_are_twice_as_wide_and_betting_hardly_pays():
    losses = table_of(0, 10, n=200) - table_of(0, 5, n=200)[::-1]
    hoeffding_result = chosen(losses, bound="hoeffding", target=0.3, loss_lower=-1)
    margin = 2 * math.sqrt(math.log(1 / DELTA) / 400)
    np.testing.assert_allclose(hoeffding_result.upper_bounds, [margin, 0.025 + margin], atol=1e-9)
    betting_result = chosen(losses, target=0.3, loss_lower=-1)
    clipped = chosen(losses.clip(0), target=0.3)
    assert betting_result.upper_bounds[0] < 1.1 * clipped.upper_bounds[0] < 0.05
    assert betting_result.upper_bounds[1] < clipped.upper_bounds[1]


# How many inputs


@pytest.mark.parametrize(
    ("bound", "expected"),
    [("hb", [149, 59, 29, 11]), ("clopper_pearson", [149, 59, 29, 11]), ("hoeffding", [3745, 600, 150, 24])],
)
def test_inputs_needed_in_closed_form(bound, expected):
    """ln(delta) / ln(1 - target), and ln(1 / delta) / (2 target^2) by Hoeffding."""
    needs(bound)
    targets = (0.02, 0.05, 0.1, 0.25)
    assert [inputs_needed(target=target, delta=0.05, bound=bound) for target in targets] == expected
    if bound == "hoeffding":
        assert inputs_needed(target=1e-6, delta=0.05, bound=bound) == math.ceil(math.log(20) / 2e-12)


def test_inputs_needed_by_the_others():
    assert [inputs_needed(target=target, method="crc") for target in (0.01, 0.05, 0.1, 0.3)] == [99, 19, 9, 3]
    assert inputs_needed(target=0.1, method="crc", loss_upper=2.0) == 19
    exact = [math.log(0.1) / math.log(1 - target) for target in (0.01, 0.05, 0.1)]
    needed = [inputs_needed(target=target, bound="wsr") for target in (0.01, 0.05, 0.1)]
    assert all(least <= enough <= 1.2 * least for least, enough in zip(exact, needed))
    assert inputs_needed(target=0.05, bound="wsr", loss_lower=-1) <= 1.2 * exact[1]


@pytest.mark.parametrize(
    ("bound", "loss_lower"),
    [
        (bound, lower)
        for bound in (*BOUNDS, "crc")
        for lower in ((0.0,) if bound == "clopper_pearson" else (0.0, -1.0))  # only for losses of 0 and 1
    ],
)
def test_fewer_inputs_than_needed_are_refused(bound, loss_lower):
    needs(bound)
    ask = {"target": 0.1, "delta": DELTA, "loss_lower": loss_lower}
    ask |= {"method": "crc"} if bound == "crc" else {"bound": bound}
    needed = inputs_needed(**ask)
    assert calibrate(np.zeros((needed, 2)), [2, 1], **ask).index == 1
    with pytest.raises(ValueError, match=f"{needed - 1} rows: n is too small.*0.1.*zero loss. {needed} inputs"):
        calibrate(np.zeros((needed - 1, 2)), [2, 1], **ask)


def test_delta_is_shared_between_calibrations():
    assert split_delta(0.1, 4) == 0.025 and split_delta(0.1, 1) == 0.1
    with pytest.raises(ValueError, match="`calibrations`.*at least 1, got 0"):
        split_delta(0.1, 0)
    with pytest.raises(ValueError, match="`delta`.*got 1.5"):
        split_delta(1.5, 2)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": [0.1, 0.2]}, r"`losses`.*\[inputs, candidates\], got \[2\]"),
        ({"losses": np.zeros((0, 2))}, r"`losses`.*got \[0, 2\]"),
        ({"losses": np.zeros((50, 0))}, r"`losses`.*got \[50, 0\]"),
        ({"losses": [["a", "b"]]}, "`losses` must be an array of numbers, got list"),
        ({"losses": np.full((50, 2), np.nan)}, "`losses` must be finite, got nan"),
        ({"losses": np.full((50, 2), 1.5)}, "`losses`.*`loss_upper` 1.0, got losses from 1.5 to 1.5: give the range"),
        ({"losses": np.full((50, 2), -0.5)}, "`losses`.*`loss_lower` 0.0.*from -0.5"),
        ({"losses": np.full((50, 2), 0.5), "bound": "clopper_pearson"}, "`losses` must be 0 or 1.*got 0.5: use 'hb'"),
        ({"bound": "clopper_pearson", "loss_upper": 2.0}, "`bound` 'clopper_pearson'.*`loss_upper` 2.0"),
        ({"bound": "clopper_pearson", "loss_lower": -1.0}, "`bound` 'clopper_pearson'.*`loss_lower` -1.0"),
        ({"costs": [1.0]}, r"`costs`.*each of the 2 columns, got shape \[1\]"),
        ({"costs": [1.0, np.inf]}, "`costs` must be finite, got inf"),
        ({"target": 0.0}, "`target`.*above 0 and below 1.0, got 0.0"),
        ({"target": 1.0}, "`target`.*got 1.0"),
        ({"target": math.nan}, "`target`.*got nan"),
        ({"target": "0.1"}, "`target`.*got '0.1'"),
        ({"delta": 0}, "`delta`.*above 0 and below 1, got 0"),
        ({"delta": True}, "`delta`.*got True"),
        ({"loss_upper": 0}, "`loss_upper`.*got 0"),
        ({"loss_upper": math.inf}, "`loss_upper`.*got inf"),
        ({"loss_lower": 0.1}, "`loss_lower`.*at most 0, got 0.1"),
        ({"loss_lower": -math.inf}, "`loss_lower`.*got -inf"),
        ({"method": "fwer"}, r"`method` must be one of \['ltt', 'ucb', 'crc'\], got 'fwer'"),
        ({"bound": "bernstein"}, "`bound` must be one of.*got 'bernstein'"),
        ({"bound": "bernstein", "method": "crc"}, "`bound` must be one of.*got 'bernstein'"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(changes, message):
    asked = {"losses": np.zeros((50, 2)), "costs": [2.0, 1.0], "target": 0.1, "bound": "wsr"} | changes
    with pytest.raises(ValueError, match=message):
        calibrate(**asked)


def test_without_scipy_the_extra_is_named_and_the_others_do(monkeypatch):
    for module in ("scipy", "scipy.special"):
        monkeypatch.setitem(sys.modules, module, None)
    for bound in ("hb", "clopper_pearson"):
        with pytest.raises(ImportError, match=r"needs `scipy.special`: pip install hf-earlyexit\[calibrate\]"):
            chosen(np.zeros((50, 2)), bound=bound)
    assert [chosen(np.zeros((150, 2)), bound=bound).index for bound in ("wsr", "hoeffding")] == [1, 1]
    assert chosen(np.zeros((50, 2)), method="crc", bound="hb").index == 1
