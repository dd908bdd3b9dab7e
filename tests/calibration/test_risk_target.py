"""A risk target is checked before anything is generated, and states how many inputs it needs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from hf_earlyexit.calibration.losses import LOSSES
from hf_earlyexit.calibration.risk_control import calibrate, inputs_needed
from hf_earlyexit.calibration.risk_target import RiskTarget, units_of
from hf_earlyexit.common.data import Example


def examples(count: int, *references: str) -> list[Example]:
    return [Example(f"input {number}", references) for number in range(count)]


def check(promise: RiskTarget, units: int, curves: int = 1, references: tuple[str, ...] = ("a",)) -> None:
    parts = {"select": examples(5, *references), "calibrate": examples(units, *references)}
    promise.check(parts, units, curves)


@pytest.mark.parametrize("curves", (1, 3))
@pytest.mark.parametrize(
    "asked", ({}, {"bound": "hoeffding", "delta": 0.2}, {"method": "ucb"}, {"loss": "rougeL_drop"}, {"method": "crc"})
)
def test_too_few_inputs_are_refused_with_how_many_are_needed(asked, curves):
    promise = RiskTarget(0.1, **asked)
    if promise.method == "crc" and curves > 1:
        return
    needed, loss = promise.inputs_needed(curves), promise.loss
    check(promise, needed, curves)
    with pytest.raises(ValueError, match=rf"has {needed - 1} units, of {needed + 4} inputs: .*`target=0.1`") as error:
        check(promise, needed - 1, curves)
    message = str(error.value)
    assert f" {needed} are needed" in message
    if promise.method == "crc":
        assert "delta" not in message and needed == 9, "the input to come loses 1"
    else:
        assert f"`delta={promise.delta}`" in message and f"by {promise.bound!r} even" in message
        assert ("over 3 curves" in message, "curves" in message) == (curves == 3, curves == 3)
        expected = {"delta": promise.delta / curves, "bound": promise.bound, "loss_lower": loss.lower}
        assert needed == inputs_needed(target=0.1, method=promise.method, **expected)


def test_units_count_not_inputs():
    promise = RiskTarget(0.1)
    many = {"select": [], "calibrate": examples(1000)}
    with pytest.raises(ValueError, match="has 2 units, of 1000 inputs"):
        promise.check(many, 2, 1)


def test_crc_has_no_delta_to_share():
    with pytest.raises(ValueError, match="`finalists=2` does not go with `method='crc'`"):
        check(RiskTarget(0.1, method="crc"), 100, curves=2)
    check(RiskTarget(0.1, method="crc"), 100)


def test_losses_against_references_need_them():
    some = examples(100, "a")
    without = Example(100 * "long")
    for loss in LOSSES.values():
        promise = RiskTarget(0.5, loss.name)
        promise.check({"select": some, "calibrate": some}, 100, 1)
        for part in ("select", "calibrate"):
            parts = {"select": some, "calibrate": some} | {part: [*some, without]}
            if not loss.needs_references:
                promise.check(parts, 100, 1)
                continue
            with pytest.raises(
                ValueError, match=rf"`loss='{loss.name}'` needs references, and the input '(long){{20}}' has none"
            ):
                promise.check(parts, 100, 1)


@pytest.mark.parametrize(
    ("asked", "message"),
    (
        ({"loss": "rouge"}, r"`loss` must be one of \['text_distance', .* got 'rouge'"),
        ({"target": 0.0}, "`target` must be a number above 0"),
        ({"target": 1.0}, "`target`"),
        ({"delta": 1}, "`delta`"),
        ({"method": "rcps"}, "`method`"),
        ({"bound": "bernstein"}, "`bound`"),
        ({"loss": "rougeL_drop", "bound": "clopper_pearson"}, "'clopper_pearson'` is for losses of 0 and 1"),
    ),
)
def test_illegal_values_are_refused_at_once(asked, message):
    with pytest.raises(ValueError, match=message):
        RiskTarget(**{"target": 0.1, **asked})


@dataclass(frozen=True)
class Points:
    """A loss in percent, down to -40."""

    name: str = "points"
    description: str = "points"
    lower: float = -40.0
    upper: float = 100.0
    needs_references: bool = False
    binary: bool = False

    def of(self, early, full, references) -> float:
        return 0.0


def test_the_range_of_the_loss_is_passed_on():
    """The range also applies to a user-defined loss object, with several curves on the same inputs."""
    promise = RiskTarget(20.0, Points(), delta=0.2, bound="hoeffding")
    losses, costs = [[-40.0, 0.0, 90.0], [2.0, 1.0, 95.0]] * 60, [3.0, 2.0, 1.0]
    expected = calibrate(losses, costs, target=20.0, delta=0.05, bound="hoeffding", loss_lower=-40.0, loss_upper=100.0)
    assert promise.calibrate(losses, costs, curves=4) == expected and expected.accepted == 2
    assert promise.calibrate(losses, costs).delta == 0.2
    assert promise.inputs_needed() == inputs_needed(
        target=20.0, delta=0.2, bound="hoeffding", loss_lower=-40.0, loss_upper=100.0
    )
    described = {"name": "points", "description": "points", "lower": -40.0, "upper": 100.0}
    assert promise.described() == {**described, "against": "full depth"}
    assert RiskTarget(0.1, "bleu_drop").described()["against"] == "references"


def test_the_loss_may_be_named():
    assert RiskTarget(0.1, "token_mismatch").loss is LOSSES["token_mismatch"]
    assert RiskTarget(0.1).loss is LOSSES["text_distance"]
    own = Points(name="own", description="own", lower=0.0, upper=2.0)
    assert RiskTarget(1.5, own).loss is own


def test_units():
    some = [Example("a", group="x"), Example("b"), Example("c", group="x"), Example("d"), Example("e")]
    assert units_of(some, None) == ["x", "b", "x", "d", "e"]
    assert units_of(some, 2) == ["batch 0", "batch 0", "batch 1", "batch 1"], "the last is not whole"
    assert units_of(some, 5) == ["batch 0"] * 5 and units_of(some, 6) == []
