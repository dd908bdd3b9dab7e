"""The Beta mixture by hand, on a known mixture, and restricted to certified thresholds whatever it observes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from hf_earlyexit.calibration.risk_control import calibrate
from hf_earlyexit.decoding.recorded_run import labelled_confidences
from hf_earlyexit.exits import beta_mixture
from hf_earlyexit.exits.beta_mixture import Beta, BetaMixture, Moments, posterior_right
from hf_earlyexit.generation.certificate import CertificateWarning
from tests.calibration.test_guarantee import DELTA, recorded
from tests.certificates import certificate_for
from tests.tiny import tiny_inputs, tiny_pair


TENTHS = [place / 10 for place in range(1, 10)]


# --- by hand --------------------------------------------------------------------------------------------------------


def test_betas_by_hand():
    """Beta(2, 1) has mean 2/3, variance 1/18 and density 2x; Beta(2, 2) has 1/2, 1/20 and 6x(1 - x)."""
    for shapes, mean, variance in (((2, 1), 2 / 3, 1 / 18), ((1, 2), 1 / 3, 1 / 18), ((2, 2), 1 / 2, 1 / 20)):
        found = Beta.matched(mean, variance)
        assert (found.alpha, found.beta) == pytest.approx(shapes)
    assert math.exp(Beta(2, 1).log_density(0.3)) == pytest.approx(0.6)
    assert math.exp(Beta(2, 2).log_density(0.25)) == pytest.approx(6 * 0.25 * 0.75)
    assert Beta.matched(0.5, 0.0) is None and Beta.matched(0.5, 0.25) is None
    assert Beta(0.5, 0.5).log_density(0.0) == Beta(0.5, 0.5).log_density(1e-4), "densities have no end"


def test_moments_by_hand():
    moments = Moments()
    assert moments.variance == 0
    for value in (0.2, 0.4, 0.9):
        moments.add(value)
    assert (moments.mean, moments.variance) == pytest.approx((0.5, (0.09 + 0.01 + 0.16) / 3))


def test_posterior_by_hand():
    """At 0.3, the densities 2x and 2(1 - x) are 0.6 and 1.4; with three of four tokens right, the odds are 1.8 to
    1.4."""
    right, wrong = Beta(2, 1), Beta(1, 2)
    assert posterior_right(0.3, right, wrong) == pytest.approx(0.3)
    assert posterior_right(0.3, right, wrong, share=0.75) == pytest.approx(1.8 / 3.2)
    assert posterior_right(0.0, Beta(9e4, 1), Beta(1, 9e4)) == 0


def test_a_tie_is_not_left_to_rounding(monkeypatch):
    """A posterior equal to zeta does not exceed it, and a candidate equal to the mean is the start, however either was
    rounded."""

    def chosen(off: float) -> float:
        moved = lambda *args: posterior_right(*args) + off  # noqa: E731
        monkeypatch.setattr(beta_mixture, "posterior_right", moved)
        return BetaMixture(TENTHS).threshold()

    assert {chosen(off) for off in (-1e-12, 0.0, 1e-12)} == {0.5}
    for off in (-1e-12, 0.0, 1e-12):
        mixture = BetaMixture([0.5, 0.9])
        monkeypatch.setattr(BetaMixture, "right", Beta(2.0, 2.0 * (1 + off)))
        monkeypatch.setattr(BetaMixture, "wrong", Beta(9.0, 1.0))
        assert mixture.threshold() == 0.5


def test_thresholds_by_hand():
    """Before observations the posterior equals the confidence; thresholds then follow the fitted distributions."""
    mixture = BetaMixture(TENTHS)
    assert mixture.threshold() == 0.5, "0.4 is not above zeta"
    assert BetaMixture(TENTHS, zeta=0.69).threshold() == 0.7
    assert BetaMixture([0.1, 0.2]).threshold() == 0.2, "the most conservative where none is above zeta"
    mixture.observe([0.5, 0.9] * 50, [False] * 100)
    assert mixture.wrong == Beta(1, 2) and mixture.threshold() == 0.5, "nothing is known of right ones"
    mixture.observe([0.7, 0.9] * 5, [True] * 10)
    for found, mean, variance in ((mixture.wrong, 0.7, 0.04), (mixture.right, 0.8, 0.01)):
        strength = mean * (1 - mean) / variance - 1
        assert (found.alpha, found.beta) == pytest.approx((mean * strength, (1 - mean) * strength))
    assert mixture.posterior(0.8) > 0.4 and mixture.posterior(0.7) > 0.4 > mixture.posterior(0.6)
    assert mixture.threshold() == 0.7
    sure = BetaMixture(TENTHS, weighted=True)
    sure.observe([0.9] * 30 + [0.1] * 10, [True] * 30 + [False] * 10)
    assert sure.posterior(0.3) == pytest.approx(1.8 / 3.2), "equal confidences have no Beta, but count"
    assert sure.threshold() == 0.2


def test_it_does_not_rest_at_the_upper_end():
    """With wrong tokens at both ends, the posterior is below zeta above 0.9 but not in the middle."""
    generator, mixture = np.random.default_rng(0), BetaMixture([place / 100 for place in range(1, 100)])
    mixture.observe(generator.beta(0.3, 0.3, 500), [False] * 500)
    mixture.observe(generator.beta(6, 3, 500), [True] * 500)
    assert mixture.posterior(0.99) < 0.4 < mixture.posterior(0.6)
    assert 0.2 < mixture.threshold() < 0.45


def test_it_passes_over_no_confidence_at_which_tokens_are_wrong():
    """With wrong tokens around 0.6, the posterior is above zeta again below that, and the threshold stays above."""
    generator, mixture = np.random.default_rng(2), BetaMixture(TENTHS)
    mixture.observe(generator.normal(0.6, 0.05, 200).clip(0, 1), [False] * 200)
    mixture.observe(generator.beta(2, 0.8, 200), [True] * 200)
    assert mixture.posterior(0.2) > 0.4 > mixture.posterior(0.6) and mixture.posterior(0.7) > 0.4
    assert mixture.threshold() == 0.7


# --- where the mixture is known -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", (False, True))
def test_it_finds_the_crossing_of_a_known_mixture(weighted):
    generator, shapes = np.random.default_rng(1), {True: (6.0, 2.0), False: (2.0, 4.0)}
    right = generator.random(20_000) < 0.8
    confidences = np.where(right, generator.beta(*shapes[True], 20_000), generator.beta(*shapes[False], 20_000))
    mixture = BetaMixture([place / 1000 for place in range(1001)], weighted=weighted)
    for part in np.array_split(np.arange(20_000), 7):
        mixture.observe(confidences[part], right[part])
    for kind, found in ((True, mixture.right), (False, mixture.wrong)):
        assert (found.alpha, found.beta) == pytest.approx(shapes[kind], rel=0.08)
    # f_right / f_wrong = x^4 (1 - x)^-2 B(2, 4) / B(6, 2), times 4 with 8 of 10 right; the crossing is at 0.4 / 0.6.
    ratio = (math.gamma(2) * math.gamma(4) / math.gamma(6)) / (math.gamma(6) * math.gamma(2) / math.gamma(8))
    grid = np.linspace(0.001, 0.999, 999)
    posterior = grid**4 * (1 - grid) ** -2 * ratio * (4 if weighted else 1)
    crossing = grid[np.argmax(posterior > 2 / 3)]
    assert mixture.threshold() == pytest.approx(crossing, abs=0.01)


# --- within what was certified --------------------------------------------------------------------------------------

SEEN = some.lists(some.tuples(some.floats(0, 1), some.booleans()), max_size=20)


@given(
    candidates=some.lists(some.floats(0, 1), min_size=1, max_size=5),
    seen=some.lists(SEEN, max_size=4),
    zeta=some.floats(0.01, 0.99),
    weighted=some.booleans(),
)
def test_it_never_leaves_its_candidates(candidates, seen, zeta, weighted):
    mixture = BetaMixture(candidates, zeta, weighted=weighted)
    for pairs in seen:
        before = mixture.threshold()
        assert before in candidates and mixture.threshold() == before
        mixture.observe([confidence for confidence, _ in pairs], [right for _, right in pairs])
    assert mixture.threshold() in candidates and 0 <= mixture.posterior(0.5) <= 1


ROWS = [(f"softmax {at}", at, at > 0.1) for at in (0.9, 0.5, 0.3, 0.1)]


@pytest.fixture
def certified():
    """A model whose certificate accepted three thresholds of its curve but not the smallest, and a point of another
    curve."""
    _, model = tiny_pair("tied", 1, torch.float32)
    setting = {"exit_criterion": "softmax", "exit_threshold": 0.5}
    curve = [{"name": name, "curve": "softmax", "threshold": at, "accepted": ok} for name, at, ok in ROWS]
    other = {"name": "softmax:2 0.2", "curve": "softmax:2", "threshold": 0.2, "accepted": True}
    model.certify(replace(certificate_for(model, setting, max_new_tokens=6), table=[*curve, other]))
    return model


def test_a_certificate_has_the_thresholds_that_were_accepted_together(certified):
    certificate = certified.exit_certificate
    assert certificate.thresholds == (0.9, 0.5, 0.3)
    assert replace(certificate, table=[]).thresholds == () == replace(certificate, certified=False).thresholds
    for threshold in (0.9, 0.5, 0.3):
        certified.generate(**tiny_inputs(2), exit_threshold=threshold, strict_certificate=True)
    for threshold in (0.1, 0.2, 0.4):
        with pytest.warns(CertificateWarning, match=rf"exit_threshold={threshold} \(certified: 0.5\)"):
            certified.generate(**tiny_inputs(2), exit_threshold=threshold)
    with pytest.raises(ValueError, match="exit_layers|exit_points"):
        certified.generate(**tiny_inputs(2), exit_threshold=0.3, exit_layers=[2], strict_certificate=True)


def test_the_example_of_the_docstring(certified):
    """The example runs strictly within the certificate, and its audits, every fourth text, change no output."""
    mixture, used = BetaMixture(certified.exit_certificate.thresholds), []
    expected = certified.generate(**tiny_inputs(1), early_exit=False)
    for number in range(8):
        audit = number % 4 == 0
        threshold = None if audit else mixture.threshold()
        output = certified.generate(
            **tiny_inputs(1),
            exit_threshold=threshold,
            record_exits=audit,
            return_dict_in_generate=True,
            strict_certificate=True,
        )
        if audit:
            assert torch.equal(output.sequences, expected)
            pairs = labelled_confidences(output)
            assert len(pairs[0]) == len(pairs[1]) == 5 * output.layers_run.shape[1]
            mixture.observe(*pairs)
        used.append(threshold)
    assert used[0] is used[4] is None and set(used) - {None} <= {0.9, 0.5, 0.3}


def test_whichever_accepted_threshold_is_used_the_promise_fails_as_rarely_as_said():
    """With recorded losses as the population, the guarantee holds even if the worst accepted threshold is always used.

    The true risk of one threshold is slightly above the target, so it is accepted occasionally.
    """
    population, draws, target = recorded("text_distance", "classifier"), 300, 0.2
    generator, risks, broken, several = np.random.default_rng(0), population.mean(axis=0), 0, 0
    for _ in range(draws):
        losses = population[generator.integers(len(population), size=200)]
        accepted = calibrate(losses, -np.arange(population.shape[1]), target=target, delta=DELTA).accepted
        broken += accepted > 0 and risks[:accepted].max() > target
        several += accepted > 1
    assert 0 < broken / draws <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / draws) and several > draws / 2


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "`candidates` must have at least one threshold, got none"),
        (([1.5],), "`candidates` must be numbers in \\[0, 1\\], got 1.5"),
        (([0.5], 1.0), "`zeta` must be a number between 0 and 1, got 1.0"),
    ],
)
def test_what_is_no_mixture(arguments, message):
    with pytest.raises(ValueError, match=message):
        BetaMixture(*arguments)


def test_what_cannot_be_observed():
    mixture = BetaMixture([0.5])
    with pytest.raises(ValueError, match="`confidences` are 1 and `agreed` 2: give one for each"):
        mixture.observe([0.5], [True, False])
    for value in (1.5, float("nan")):
        with pytest.raises(ValueError, match="`confidences` must be numbers in"):
            mixture.observe([0.4, value], [True, True])
    assert mixture.right == Beta(2, 1), "nothing of it was taken"
