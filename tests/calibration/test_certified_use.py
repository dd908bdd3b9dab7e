"""A certificate covers only the implementations and input lengths that it was measured with."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from transformers import CompileConfig

from hf_earlyexit.calibration.agreement import add_implementations
from hf_earlyexit.calibration.deployment import DeploymentSettings
from hf_earlyexit.calibration.losses import LOSSES
from hf_earlyexit.calibration.model_calibration import calibrate_model
from hf_earlyexit.calibration.risk_target import RiskTarget
from hf_earlyexit.calibration.search import Search
from hf_earlyexit.cli.generate import can_be_prepared
from hf_earlyexit.decoding.candidates import full_depth
from hf_earlyexit.evaluation.generate_texts import TextGenerator
from hf_earlyexit.families.shipped import default_examples, load_default
from hf_earlyexit.families.t5.prepared import PreparedT5Decoder
from hf_earlyexit.generation.certificate import FILE, Certificate, CertificateWarning
from hf_earlyexit.generation.fingerprint import weights_fingerprint
from hf_earlyexit.kernels.compiling import CompileOptions
from tests.certificates import certificate_for
from tests.parts import drawn
from tests.tiny import tiny_inputs, tiny_pair


SETTING = {"exit_criterion": "softmax", "exit_threshold": 0.5, "exit_layers": [2, 4]}
DECODING = {"max_new_tokens": 4}
STATIC = {"cache_implementation": "static"}


def certified_model(**changes):
    _, model = tiny_pair("tied", 1, torch.float32)
    model.certify(replace(certificate_for(model, SETTING, **DECODING), **changes))
    return model


def cut_to(tokens: int | None) -> dict:
    return {"name": "", "fingerprint": "", "max_source_tokens": tokens}


def refusal(model, inputs=None, **call) -> str:
    """The reason why a strict call is refused; empty if it is not. The call without strict mode must warn once."""
    inputs = tiny_inputs(2) if inputs is None else inputs
    reason = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CertificateWarning)
        try:
            model.generate(**inputs, **call, strict_certificate=True)
        except ValueError as error:
            reason = str(error)
            model.generate(**inputs, **call)
    assert [one.category for one in caught] == [CertificateWarning] * bool(reason)
    return reason


@pytest.fixture(autouse=True)
def compiles_as_captured(monkeypatch):
    """Use the usual compile options with the eager backend, because compiling would take a minute."""
    monkeypatch.setattr(CompileOptions, "usual", classmethod(lambda cls: cls("eager")))


# --- laws, also called by the mutation tests ------------------------------------------------------------------------


def a_prepared_call_is_not_covered_by_a_plain_measurement() -> None:
    model = certified_model()
    assert not refusal(model)
    model.prepare_for_generation()
    assert "implementation='prepared' (certified: ['plain'])" in refusal(model)


def longer_sources_are_not_covered() -> None:
    model = certified_model(data=cut_to(8))
    assert "source tokens=11 (certified: at most 8)" in refusal(model)
    short = {name: part[:, :8] for name, part in tiny_inputs(2).items()}
    assert not refusal(model, short)


def rows_that_wait_are_covered_at_their_number_alone() -> None:
    _, model = tiny_pair("tied", 1, torch.float32)
    for rule in ("batch", "batch_joint"):
        model.certify(certificate_for(model, SETTING | {"batch_exit": rule}, rows=2, **DECODING))
        assert not refusal(model)
        assert "batch_size=3 (certified: 2)" in refusal(model, tiny_inputs(3))
        assert "batch_size=1 (certified: 2)" in refusal(model, tiny_inputs(1))


# --- implementations of the decoder ---------------------------------------------------------------------------------


def test_a_prepared_call_is_not_covered_by_a_plain_measurement():
    a_prepared_call_is_not_covered_by_a_plain_measurement()


def test_it_is_refused_before_any_work(monkeypatch):
    model = certified_model().prepare_for_generation()
    monkeypatch.setattr(model.encoder, "forward", None)
    with pytest.raises(ValueError, match="implementation='prepared'"):
        model.generate(**tiny_inputs(2), strict_certificate=True)


def test_a_compiled_call_is_a_way_of_its_own():
    model = certified_model(implementations=["plain", "prepared"])
    assert not refusal(model)
    assert "implementation='compiled' (certified: ['plain', 'prepared'])" in refusal(model, **STATIC)
    assert not refusal(model, **STATIC, disable_compile=True), "the copy that compiling has made is covered"


def test_all_ways_that_are_named_are_covered():
    model = certified_model(implementations=["plain", "prepared", "compiled"])
    assert not refusal(model) and not refusal(model.prepare_for_generation()) and not refusal(model, **STATIC)


def test_other_options_of_the_compiler_are_another_way():
    model = certified_model(implementations=["plain", "prepared", "compiled"])
    call = {**STATIC, "compile_config": CompileConfig(backend="aot_eager")}
    assert "implementation=\"compiled with CompileOptions(backend='aot_eager'" in refusal(model, **call)


def test_a_copy_that_will_be_dropped_is_not_how_the_call_runs():
    model = certified_model(implementations=["plain"]).prepare_for_generation()
    model.decoder.block[0].layer[0].layer_norm.variance_epsilon *= 2
    with pytest.warns(UserWarning, match="so its copy is dropped"):
        model.generate(**tiny_inputs(2), strict_certificate=True)


def test_of_what_was_measured_prepared_plain_is_not_covered():
    model = certified_model(implementations=["prepared"])
    assert "implementation='plain' (certified: ['prepared'])" in refusal(model)


def test_files_of_before_hold_for_the_plain_way_alone(tmp_path):
    values = asdict(certified_model(implementations=["plain", "prepared"]).exit_certificate)
    del values["implementations"], values["agreement"]
    (tmp_path / FILE).write_text(json.dumps(values))
    old = Certificate.load(tmp_path / FILE)
    assert old.implementations == ["plain"] and old.agreement == {}
    _, model = tiny_pair("tied", 1, torch.float32)
    model.certify(old)
    assert not refusal(model) and "implementation" in refusal(model.prepare_for_generation())


def test_the_command_line_prepares_what_may_be():
    """The command line does not prepare a model whose certificate covers the plain implementation only."""
    _, bare = tiny_pair("tied", 1, torch.float32)
    ways = {("plain",): False, ("plain", "prepared"): True, ("prepared",): True}
    assert can_be_prepared(bare)
    for implementations, expected in ways.items():
        assert can_be_prepared(certified_model(implementations=list(implementations))) == expected


# --- lengths and batches --------------------------------------------------------------------------------------------


def test_longer_sources_are_not_covered():
    longer_sources_are_not_covered()


def test_padding_is_not_length():
    model, inputs = certified_model(data=cut_to(8)), tiny_inputs(2)
    for mask in ([1] * 8 + [0] * 3, [0] * 3 + [1] * 8):
        assert not refusal(model, {**inputs, "attention_mask": torch.tensor([mask, mask])})
    assert "source tokens=11" in refusal(model, {"input_ids": inputs["input_ids"].clamp(min=4)})
    states = model.encoder(**inputs)
    assert "source tokens=11" in refusal(
        model, {"encoder_outputs": states, "attention_mask": inputs["attention_mask"]}
    )
    embedded = {"inputs_embeds": model.shared(inputs["input_ids"]), "attention_mask": inputs["attention_mask"]}
    assert "source tokens=11" in refusal(model, embedded)


def test_without_a_cut_any_length_is_of_the_kind():
    assert not refusal(certified_model(data=cut_to(None)), tiny_inputs(2, longest=40))


def test_rows_that_wait_are_covered_at_their_number_alone():
    rows_that_wait_are_covered_at_their_number_alone()


# --- calibration with several implementations -----------------------------------------------------------------------


INPUTS, CALIBRATED = {"select": 8, "calibrate": 16, "report": 16}, {"max_new_tokens": 5}
SEARCH = Search(curves={"classifier": [0.9, 0.3]}, order="threshold", cost="layers")
LOSS = LOSSES["text_distance"]


@pytest.fixture(scope="module")
def shipped():
    return load_default()


@pytest.fixture(scope="module")
def examples():
    return drawn(default_examples(), **INPUTS)


def go_wrong(monkeypatch) -> None:
    """Make prepared decoders wrong, also at full depth: another token wherever the likeliest id is a multiple of 5."""
    lm_head = PreparedT5Decoder.lm_head

    def wrong(self, head_input):
        logits = lm_head(self, head_input)
        return logits.roll(1, -1).where(logits.argmax(-1, keepdim=True) % 5 == 0, logits)

    monkeypatch.setattr(PreparedT5Decoder, "lm_head", wrong)


@pytest.fixture
def goes_wrong(monkeypatch):
    go_wrong(monkeypatch)


def calibrated(shipped, examples, *implementations, target: float = 0.9, path=None):
    use = DeploymentSettings(generation=CALIBRATED, implementations=implementations or None)
    return calibrate_model(*shipped, examples, RiskTarget(target), use, SEARCH, path=path)


def texts_of(model, tokenizer, examples, candidate):
    writer = TextGenerator(model, tokenizer, batch_size=1, generation=CALIBRATED)
    return writer.write(examples, candidate, "by hand").texts


def assert_same_tables(one: Certificate, other: Certificate) -> None:
    """Numbers are compared up to rounding, because sums are in a different order."""
    assert [[*row] for row in one.table] == [[*row] for row in other.table]
    for row, others in zip(one.table, other.table):
        assert row == pytest.approx(others)


@pytest.fixture(scope="module")
def plain(shipped, examples) -> Certificate:
    return calibrated(shipped, examples).certificate


@pytest.mark.parametrize("others", [["prepared"], pytest.param(["prepared", "compiled"], marks=pytest.mark.slow)])
def test_ways_that_agree_change_nothing(shipped, examples, plain, others):
    all_ways = calibrated(shipped, examples, "plain", *others).certificate
    assert plain.implementations == ["plain"] and not plain.agreement
    assert all_ways.implementations == ["plain", *others]
    passed = sum(row["accepted"] for row in plain.table)
    assert passed == 2
    assert all_ways.agreement == dict.fromkeys(others, {"texts": 16 * passed, "different": 0, "batch_size": 1})
    assert_same_tables(all_ways, plain)
    assert not shipped[0].is_prepared


def disagreements_count(shipped, examples) -> None:
    """Each input counts with its largest loss, against full depth as measured and under the same implementation."""
    found, (model, tokenizer) = calibrated(shipped, examples, "plain", "prepared"), shipped
    inputs = SEARCH.partition.split(examples)["calibrate"]
    alias = copy.copy(model).prepare_for_generation()
    full = {
        name: texts_of(one, tokenizer, inputs, full_depth()) for name, one in (("plain", model), ("prepared", alias))
    }
    for candidate, column in zip(found.tables["calibrate"].candidates, found.tables["calibrate"].losses.T):
        early = texts_of(model, tokenizer, inputs, candidate)
        others = texts_of(alias, tokenizer, inputs, candidate)
        losses = [
            [LOSS.of(*pair, ()) for pair in zip(texts, reference)]
            for texts, reference in ((early, full["plain"]), (others, full["plain"]), (others, full["prepared"]))
        ]
        np.testing.assert_allclose(column, np.max(losses, axis=0))
        assert np.max(losses, axis=0).mean() > np.mean(losses[0]), "the other way goes wrong nowhere"
    agreement = found.certificate.agreement["prepared"]
    assert 0 < agreement["different"] <= agreement["texts"]


@pytest.mark.once
def test_disagreements_count(shipped, examples, goes_wrong):
    disagreements_count(shipped, examples)


@pytest.mark.once
def test_a_way_that_goes_wrong_costs_the_promise(shipped, examples, plain, goes_wrong, tmp_path):
    """A wrong implementation prevents certification at a target that the measured implementation alone would keep."""
    ways, journal = ("plain", "prepared"), tmp_path / "journal"
    both = calibrated(shipped, examples, *ways, path=journal).certificate
    bounds = [one.table[0]["upper_bound"] for one in (plain, both)]
    assert bounds[0] + 0.05 < bounds[1], bounds
    again = calibrated(shipped, examples, *ways, target=sum(bounds) / 2, path=journal).certificate
    assert not again.certified and again.agreement["prepared"]["different"]


@pytest.mark.once
def test_the_first_way_is_measured(shipped, examples, plain, goes_wrong):
    """A prepared model is measured as prepared unless `implementations` names others."""
    model, tokenizer = shipped
    try:
        as_it_is = calibrated((model.prepare_for_generation(), tokenizer), examples).certificate
    finally:
        model.unprepare()
    named = calibrated(shipped, examples, "prepared").certificate
    assert as_it_is.implementations == named.implementations == ["prepared"]
    assert_same_tables(as_it_is, named)
    assert [row["mean"] for row in named.table] != pytest.approx([row["mean"] for row in plain.table])


@pytest.mark.once
def test_ways_are_added_as_if_calibrated_with_them(shipped, examples, plain, goes_wrong, tmp_path):
    both, model = calibrated(shipped, examples, "plain", "prepared").certificate, shipped[0]
    added = add_implementations(plain, *shipped, examples[::-1], LOSS, ["prepared"], path=tmp_path / "journal")
    assert added.implementations == both.implementations and added.agreement == both.agreement
    assert_same_tables(added, both)
    assert added.risk == pytest.approx(both.risk) and not model.is_prepared
    with pytest.raises(
        ValueError, match="another run: conditions, setting differ"
    ):  # texts of one are not the other's
        threshold = {"exit_threshold": 0.99}
        other = replace(plain, setting=plain.setting | threshold, generation=plain.generation | threshold)
        add_implementations(other, *shipped, examples, LOSS, ["prepared"], path=tmp_path / "journal")
    double = copy.deepcopy(model).double()
    with pytest.raises(ValueError, match="The model is not as certified: dtype"):
        add_implementations(
            replace(plain, weights=weights_fingerprint(double)), double, *shipped[1:], examples, LOSS, []
        )
    with pytest.raises(ValueError, match="`implementations` must be some of .* each once"):
        add_implementations(added, *shipped, examples, LOSS, ["prepared"])
    with pytest.raises(ValueError, match="lacks inputs of the certificate's calibrate part"):
        add_implementations(plain, *shipped, examples[:5], LOSS, ["prepared"])
    with pytest.raises(ValueError, match="the certificate is about 'text_distance'"):
        add_implementations(plain, *shipped, examples, LOSSES["text_mismatch"], ["prepared"])
    with pytest.raises(ValueError, match="`implementations` must be some of"):
        DeploymentSettings(implementations=["fast"])
