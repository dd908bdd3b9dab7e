"""A certificate is copied, saved and loaded with its model, and calls that it does not cover warn or are refused."""

from __future__ import annotations

import copy
import json
import threading
import warnings
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, LogitsProcessorList

from hf_earlyexit import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.decoding.settings import CERTIFICATE
from hf_earlyexit.generation.certificate import FILE, Certificate, CertificateWarning, confidence
from hf_earlyexit.generation.certified import uncertified
from tests.certificates import certificate_for
from tests.tiny import Unrest, tiny_inputs, tiny_pair


SETTING = {"exit_criterion": "softmax", "exit_threshold": 0.5, "exit_layers": [2, 4]}
DECODING = {"max_new_tokens": 6}


@pytest.fixture
def model():
    """A certified model in fp32."""
    _, model = tiny_pair("tied", 1, torch.float32)
    model.certify(certificate_for(model, SETTING, **DECODING))
    return model


def generate(model, **kwargs):
    return model.generate(**tiny_inputs(3), **kwargs)


def quiet(model, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error", CertificateWarning)
        return generate(model, **kwargs)


def test_a_certified_model_generates_as_certified_in_silence(model):
    stored = quiet(model, strict_certificate=True)
    assert torch.equal(stored, quiet(uncertified(model), **SETTING, **DECODING))
    assert torch.equal(stored, quiet(model, **SETTING, **DECODING, fill="eager"))
    assert torch.equal(stored, quiet(model, cache_implementation="static", disable_compile=True))
    assert model.generation_config.max_new_tokens == 6, "the decoding is taken over, too"


def test_full_depth_is_never_warned_about(model):
    quiet(model, early_exit=False, max_new_tokens=3, num_beams=2)
    quiet(model, early_exit=False, strict_certificate=True)


OUTSIDE = [
    ({"exit_threshold": 0.4}, r"exit_threshold=0.4 \(certified: 0.5\)"),
    ({"exit_criterion": "state", "exit_threshold": 0.5}, r"exit_criterion='state' \(certified: 'softmax'\)"),
    ({"exit_layers": [2]}, r"exit_points=\[2\] \(certified: \[2, 4\]\)"),
    ({"exit_candidates": 8}, r"exit_candidates=8 \(certified: None\)"),
    ({"exit_schedule": "calm"}, r"exit_schedule={'name': 'calm', 'tau': 4.0} \(certified: 'constant'\)"),
    ({"batch_exit": "batch"}, r"batch_exit='batch' \(certified: 'row'\)"),
    ({"max_new_tokens": 7}, r"max_new_tokens=7 \(certified: 6\)"),
    ({"num_beams": 2}, r"num_beams=2 \(certified: None\)"),
    ({"do_sample": True}, r"do_sample=True \(certified: None\)"),
    ({"repetition_penalty": 1.2}, r"repetition_penalty=1.2 \(certified: None\)"),
    ({"logits_processor": LogitsProcessorList([Unrest()])}, r"logits_processor=.*\(certified: None\)"),
]


@pytest.mark.parametrize(("changes", "message"), OUTSIDE, ids=[next(iter(changes)) for changes, _ in OUTSIDE])
def test_what_is_outside_is_named(model, changes, message):
    before = copy.deepcopy(model.generation_config.to_dict())
    with pytest.warns(CertificateWarning, match=message) as caught:
        warned = generate(model, **changes)
    named = str(caught[0].message).count("certified:")
    assert len(caught) == 1 and named == 1 + ("batch_exit" in changes) and caught[0].filename == __file__
    with pytest.raises(ValueError, match="`strict_certificate=True`.*not covered: " + message):
        generate(model, **changes, strict_certificate=True)
    assert model.generation_config.to_dict() == before
    if "do_sample" not in changes:
        assert torch.equal(warned, quiet(uncertified(model), **{**SETTING, **DECODING, **changes}))


def test_a_warning_comes_once_for_a_place_and_a_message(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        for length in (5, 5, 4, 4):
            generate(model, max_new_tokens=length)
    assert [str(one.message).count("max_new_tokens") for one in caught] == [1, 1]


def test_candidates_are_certified_with_their_number(tmp_path):
    _, model = tiny_pair("tied", 1, torch.float32)
    model.certify(certificate_for(model, SETTING | {"exit_candidates": 8}, **DECODING))
    assert model.generation_config.exit_candidates == 8
    quiet(model, strict_certificate=True)
    with pytest.warns(CertificateWarning, match=r"exit_candidates=4 \(certified: 8\)"):
        generate(model, exit_candidates=4)
    model.save_pretrained(tmp_path)
    quiet(EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path).eval(), strict_certificate=True)


def test_certificates_of_before_there_were_candidates_are_of_none(model):
    known = {name: value for name, value in model.exit_certificate.generation.items() if name != "exit_candidates"}
    assert len(known) == len(model.exit_certificate.generation) - 1
    model.exit_certificate = replace(model.exit_certificate, generation=known)
    quiet(model, strict_certificate=True)
    with pytest.warns(CertificateWarning, match=r"exit_candidates=8 \(certified: None\)"):
        generate(model, exit_candidates=8)


def test_rows_that_wait_for_each_other_are_certified_with_their_number():
    _, model = tiny_pair("tied", 1, torch.float32)
    model.certify(certificate_for(model, SETTING | {"batch_exit": "batch"}, rows=3, **DECODING))
    quiet(model, strict_certificate=True)
    with pytest.warns(CertificateWarning, match=r"batch_size=2 \(certified: 3\)"):
        model.generate(**tiny_inputs(2))


def test_versions_and_dtype_are_compared(model):
    versions = model.exit_certificate.versions
    model.exit_certificate = replace(model.exit_certificate, versions=versions | {"torch": "0.0.1"})
    with pytest.warns(CertificateWarning, match=r"torch version='2.*certified: '0.0'"):
        generate(model)
    patched = ".".join([*versions["torch"].split(".")[:2], "99+cpu"])
    model.exit_certificate = replace(model.exit_certificate, versions=versions | {"torch": patched})
    quiet(model)
    with pytest.warns(CertificateWarning, match=r"dtype='bfloat16' \(certified: 'float32'\)"):
        generate(model.to(torch.bfloat16))


@torch.no_grad()
def test_changed_weights_are_noticed(model):
    quiet(model)
    model.decoder.block[0].layer[0].SelfAttention.q.weight.mul_(1.01)
    with pytest.warns(CertificateWarning, match="the weights are not the certified ones"):
        generate(model)
    with pytest.raises(ValueError, match="the weights are not the certified ones"):
        generate(model, strict_certificate=True)
    again = copy.deepcopy(tiny_pair("tied", 1, torch.float32)[1])
    again.certify(model.exit_certificate)
    quiet(again, strict_certificate=True)


@torch.no_grad()
def test_weights_that_nobody_saw_change_are_not_saved_with_a_certificate(model, tmp_path):
    """Weights written through `.data`, or passed to `save_pretrained`, are saved without the certificate."""
    model.save_pretrained(tmp_path / "first")
    other = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other["encoder.block.0.layer.0.SelfAttention.q.weight"].mul_(2)
    with pytest.warns(CertificateWarning, match="not saved with them"):
        model.save_pretrained(tmp_path / "given", state_dict=other)
    model.decoder.block[0].layer[0].SelfAttention.q.weight.data.mul_(1.5)
    with pytest.warns(CertificateWarning, match="not saved with them"):
        model.save_pretrained(tmp_path / "second")
    found = [
        EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("first", "given", "second")
    ]
    assert [one.exit_certificate is None for one in found] == [False, True, True]


def test_autocast_is_outside(model):
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(CertificateWarning, match=r"autocast='bfloat16' \(certified: None\)"):
            generate(model)
        with pytest.raises(ValueError, match="autocast"):
            generate(model, strict_certificate=True)


def test_decoding_that_is_the_librarys_default_is_taken_over_too():
    _, model = tiny_pair("tied", 1, torch.float32)
    certificate = certificate_for(model, SETTING, **DECODING)
    model.generation_config.update(num_beams=4, no_repeat_ngram_size=3, repetition_penalty=1.5, eos_token_id=1)
    certificate = replace(certificate, generation={**certificate.generation, "eos_token_id": 1})
    model.certify(certificate)
    assert torch.equal(quiet(model, strict_certificate=True), quiet(uncertified(model), **SETTING, **DECODING))
    assert model.generation_config.num_beams is None and model.generation_config.no_repeat_ngram_size is None


SAME = [
    {"logits_processor": LogitsProcessorList()},
    {"exit_schedule": {"name": "constant"}},
    {"temperature": 0.7},
    {"num_beams": 1, "do_sample": False, "repetition_penalty": 1.0},
]


@pytest.mark.parametrize("said", SAME, ids=[next(iter(one)) for one in SAME])
def test_what_says_the_same_in_other_words_is_inside(model, said):
    quiet(model, **said, strict_certificate=True)


def test_a_schedule_is_spelled_out_with_its_default():
    _, model = tiny_pair("tied", 1, torch.float32)
    model.certify(certificate_for(model, SETTING | {"exit_schedule": "calm"}, **DECODING))
    quiet(model, exit_schedule={"name": "calm", "tau": 4}, strict_certificate=True)
    with pytest.raises(ValueError, match="'tau': 2}"):
        generate(model, exit_schedule={"name": "calm", "tau": 2}, strict_certificate=True)


def test_encoder_outputs_have_rows(model):
    _, waiting = tiny_pair("tied", 1, torch.float32)
    waiting.certify(certificate_for(waiting, SETTING | {"batch_exit": "batch"}, rows=3, **DECODING))
    inputs = tiny_inputs(3)
    states = waiting.encoder(**inputs)
    waiting.generate(encoder_outputs=states, attention_mask=inputs["attention_mask"], strict_certificate=True)


def test_strictness_that_is_stored_stays(model):
    model.generation_config.strict_certificate = True
    model.certify(model.exit_certificate)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, max_new_tokens=3)


def test_confidence_is_never_rounded_up():
    assert [confidence(delta) for delta in (0.1, 0.05, 0.025, 0.001)] == ["90 %", "95 %", "97.5 %", "99.9 %"]
    assert confidence(1e-9) == "99.9999 %"


def test_weights_are_read_only_when_they_may_have_changed(model, monkeypatch):
    from hf_earlyexit.generation import certified

    calls = []
    real = certified.weights_fingerprint
    monkeypatch.setattr(certified, "weights_fingerprint", lambda *args: calls.append(1) or real(*args))
    for _ in range(3):
        quiet(model, strict_certificate=True)
    assert len(calls) == 1
    model.load_state_dict(model.state_dict())
    quiet(model)
    quiet(model)
    assert len(calls) == 2
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    for _ in range(3):
        with pytest.warns(CertificateWarning):
            generate(model)
    assert len(calls) == 3


def test_strict_without_a_certificate_is_refused():
    _, model = tiny_pair("tied", 1, torch.float32)
    with pytest.raises(ValueError, match="not covered: the model has no certificate"):
        generate(model, **SETTING, **DECODING, strict_certificate=True)
    with pytest.raises(ValueError, match="`strict_certificate` must be True or False, got 'yes'"):
        generate(model, **SETTING, strict_certificate="yes")


def test_it_goes_through_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    for kind in (EarlyExitT5ForConditionalGeneration, AutoModelForSeq2SeqLM):
        loaded = kind.from_pretrained(tmp_path).eval()
        assert loaded.exit_certificate == model.exit_certificate
        assert torch.equal(quiet(loaded, strict_certificate=True), quiet(model))
        assert getattr(loaded.generation_config, CERTIFICATE) == FILE
    stored = json.loads((tmp_path / FILE).read_text())
    assert Certificate(**stored) == model.exit_certificate and stored == json.loads(
        json.dumps(asdict(model.exit_certificate))
    )


def test_loaded_weights_are_trusted_until_strict(model, tmp_path):
    model.save_pretrained(tmp_path)
    certificate = replace(model.exit_certificate, weights="0" * 64)
    certificate.save(tmp_path)
    loaded = EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    quiet(loaded)
    with pytest.raises(ValueError, match="the weights are not the certified ones"):
        generate(loaded, strict_certificate=True)
    other_exits = EarlyExitT5ForConditionalGeneration.from_pretrained(
        tmp_path, early_exit={"exit_layers": [2, 4]}
    ).eval()
    with pytest.warns(CertificateWarning, match="the weights are not"):
        generate(other_exits.eval())


@torch.no_grad()
def test_other_weights_are_saved_without_it(model, tmp_path):
    model.lm_head.weight.mul_(2)
    with pytest.warns(CertificateWarning, match="not those.*calibrate again") as caught:
        model.save_pretrained(tmp_path)
    assert len(caught) == 1
    loaded = EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.exit_certificate is None and not (tmp_path / FILE).exists()
    assert loaded.generation_config.exit_threshold == 0.5
    assert model.exit_certificate is not None and getattr(model.generation_config, CERTIFICATE) == FILE


def test_a_named_certificate_that_is_missing_is_told(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.warns(CertificateWarning, match=f"names a certificate, {FILE}, which is not there"):
        loaded = EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.exit_certificate is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no certificate"),
        ("[]", "no certificate"),
        ('{"format": 9}', "format 9, known is 1: install a newer"),
        ('{"format": 1, "target": 0.1}', r"differs in \['bound', 'certified'"),
    ],
)
def test_files_that_are_none_are_refused(text, message, tmp_path):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=message):
        Certificate.load(tmp_path / FILE)


def test_another_certificate_takes_the_place_of_all_stored_settings(model):
    other = certificate_for(model, {"exit_criterion": "state", "exit_threshold": 0.9}, max_new_tokens=4)
    model.certify(other)
    assert getattr(model.generation_config, "exit_layers", None) is None
    quiet(model, strict_certificate=True)


def test_uncertified_shares_weights_and_leaves_the_model(model):
    bare = uncertified(model)
    assert bare.exit_certificate is None and model.exit_certificate is not None
    assert bare.decoder is model.decoder and bare.lm_head.weight is model.lm_head.weight
    assert not hasattr(bare.generation_config, "exit_criterion")
    assert model.generation_config.exit_criterion == "softmax"


@pytest.mark.filterwarnings("ignore::hf_earlyexit.generation.certificate.CertificateWarning")
def test_threads_do_not_see_each_others_strictness(model):
    results = {}

    def run(name, **kwargs):
        try:
            results[name] = generate(model, **kwargs)
        except ValueError as error:
            results[name] = error

    threads = [
        threading.Thread(target=run, args=("strict",), kwargs={"max_new_tokens": 5, "strict_certificate": True}),
        threading.Thread(target=run, args=("lax",), kwargs={"max_new_tokens": 5}),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(results["strict"], ValueError) and torch.is_tensor(results["lax"])


def test_words(model):
    certificate = replace(
        model.exit_certificate,
        report={"n": 80, "mean": 0.02, "low": 0.01, "high": 0.03, "mean_layers": 4.5, "cost": 0.7},
        attempts=0,
    )
    unrecorded = replace(certificate, attempts=None).in_words().removeprefix(certificate.in_words())
    assert unrecorded == " Whether earlier certificates were tested on these calibration inputs was not recorded."
    assert certificate.in_words() == (
        "With 90 % confidence over the draw of 100 calibration inputs, the mean distance on inputs like these is at "
        "most 0.1 with softmax 0.5. On these it was 0.01; it costs 0.60 of stock's time, batch 1, measured on the "
        "select part. On 80 others that nothing was chosen on it was 0.02 (95 % interval 0.01 to 0.03), with 4.50 "
        "layers per token, at 0.70 of stock's time, batch 1."
    )
    crc = replace(certificate, delta=None, method="crc", unit="batch of 8 inputs", report=None)
    assert crc.in_words().startswith(
        "In expectation over the draw of 100 calibration batches of 8 inputs and one to come"
    )
    nothing = replace(certificate, certified=False, reason="no setting was shown to keep the target", risk=None)
    assert nothing.in_words().startswith("Nothing is promised of early exit: no setting was shown to keep the tar")
