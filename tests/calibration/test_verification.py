"""Verification on new inputs: which inputs count, when the guarantee is refuted; stored settings have no effect."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

from hf_earlyexit.calibration.losses import LOSSES
from hf_earlyexit.calibration.model_calibration import DeploymentSettings, calibrate_model
from hf_earlyexit.calibration.risk_target import RiskTarget
from hf_earlyexit.calibration.search import Search
from hf_earlyexit.calibration.verification import _p_value_of_the_promise, verify_certificate
from hf_earlyexit.common.data import Example
from hf_earlyexit.families.shipped import default_examples, load_default
from tests.parts import drawn


SEARCH = Search(curves={"softmax:2,4,6": [0.5, 0.9], "classifier": [0.9, 0.5]}, order="threshold", cost="layers")


@pytest.fixture(scope="module")
def shipped():
    return load_default()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return drawn(default_examples(), select=12, calibrate=24, report=24)


@pytest.fixture(scope="module")
def found(shipped, examples):
    return calibrate_model(
        *shipped, examples, RiskTarget(0.5), DeploymentSettings(generation={"max_new_tokens": 8}), SEARCH
    )


def test_verification_is_of_new_inputs_only(shipped, examples, found):
    seen = found.certificate.split["counts"]
    checked = verify_certificate(*shipped, examples, LOSSES["text_distance"], found.certificate)
    assert checked.left_out == seen["select"] + seen["calibrate"] and checked.n == seen["report"]
    report = found.certificate.report
    assert checked.mean == pytest.approx(report["mean"]) and checked.low == pytest.approx(report["low"], abs=0.02)
    assert checked.mean_layers == report["mean_layers"]
    assert not checked.refuted and checked.differences == [] and "kept here" in checked.in_words()
    with pytest.raises(ValueError, match="has 0 inputs that the certificate has not seen"):
        verify_certificate(
            *shipped, SEARCH.partition.split(examples)["select"], LOSSES["text_distance"], found.certificate
        )


def test_texts_of_another_dtype_are_not_taken_from_the_journal(shipped, examples, found, tmp_path):
    path, loss = tmp_path / "journal", LOSSES["text_distance"]
    verify_certificate(*shipped, examples, loss, found.certificate, path=path)
    half = copy.deepcopy(shipped[0]).bfloat16()
    with pytest.raises(ValueError, match="entries of another run: conditions"):
        verify_certificate(half, shipped[1], examples, loss, found.certificate, path=path)


def test_a_promise_that_does_not_hold_is_refuted(shipped, examples, found):
    false = replace(found.certificate, target=0.01, weights="0" * 64)
    checked = verify_certificate(*shipped, examples, LOSSES["text_distance"], false)
    assert checked.refuted and "REFUTED" in checked.in_words() and checked.differences == ["weights"]
    barely = replace(found.certificate, target=checked.mean - 1e-3)
    unclear = verify_certificate(*shipped, examples, LOSSES["text_distance"], barely)
    assert not unclear.refuted and "not so clearly" in unclear.in_words()
    with pytest.raises(ValueError, match="`loss` is 'token_mismatch', the certificate is about 'text_distance'"):
        verify_certificate(*shipped, examples, LOSSES["token_mismatch"], found.certificate)
    with pytest.raises(ValueError, match="The model has no certificate"):
        verify_certificate(*shipped, examples, LOSSES["text_distance"])


@pytest.mark.parametrize("lower", [0.0, -1.0])
def test_a_promise_that_just_holds_is_seldom_refuted(found, lower):
    generator = np.random.default_rng(0)
    certificate = replace(found.certificate, target=0.2, loss={**found.certificate.loss, "lower": lower})
    spread = 0.2 if lower else 0.0
    losses = (generator.random((1000, 120)) < 0.2 + spread) - (generator.random((1000, 120)) < spread) * 1.0
    refuted = [_p_value_of_the_promise(one.clip(lower, 1), certificate) <= 0.05 for one in losses]
    assert np.mean(refuted) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)
    clearly = [_p_value_of_the_promise(one, certificate) <= 0.05 for one in (generator.random((50, 120)) < 0.4) * 1.0]
    assert np.mean(clearly) > 0.8


def test_verification_decodes_as_certified_whatever_is_stored(shipped, examples, found):
    model, tokenizer = copy.deepcopy(shipped[0]), shipped[1]
    plain = verify_certificate(model, tokenizer, examples, LOSSES["text_distance"], found.certificate)
    model.generation_config.update(num_beams=3, repetition_penalty=1.5)
    other = verify_certificate(model, tokenizer, examples, LOSSES["text_distance"], found.certificate)
    assert other == plain and plain.differences == []
    assert model.generation_config.num_beams == 3
