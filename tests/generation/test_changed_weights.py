"""Copies and certificates detect writes of fused optimizers, which do not increase torch's version counter."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from transformers import Seq2SeqTrainer

from hf_earlyexit import EarlyExitConfig, EarlyExitT5ForConditionalGeneration
from hf_earlyexit.generation.certificate import CertificateWarning
from hf_earlyexit.generation.fingerprint import parameter_versions, same_sums, weights_sums
from tests import laws
from tests.certificates import certificate_for
from tests.tiny import tiny_inputs, tiny_pair
from tests.training.trainers import make_trainer


OPTIMIZERS = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "SGD": torch.optim.SGD}
SETTING = {"exit_criterion": "softmax", "exit_threshold": 0.5}
CALL = {"exit_criterion": "fixed", "exit_layer": 3, "max_new_tokens": 4}


def model_with_heads(dtype=torch.float32):
    return tiny_pair("untied", 1, dtype, early_exit=EarlyExitConfig(heads="norm"))[1]


def fused_step(model, optimizer: str = "AdamW", part: str = "") -> None:
    """One step of a fused optimizer on a part of the model, with the rest frozen, in eval mode."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(part))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    OPTIMIZERS[optimizer](trained, lr=0.05, fused=True).step()


# --- the laws, also called by the mutations -------------------------------------------------------------------------


def a_copy_is_right_after_a_fused_step(optimizer: str = "AdamW", part: str = "exit_heads") -> None:
    model = model_with_heads().prepare_for_generation()
    before, versions = laws.generate(model, tiny_inputs(2), **CALL), [one._version for one in model.parameters()]
    fused_step(model, optimizer, part)
    assert versions == [one._version for one in model.parameters()], "torch counts these writes: the law is vacuous"
    plain = copy.copy(model)
    plain.unprepare()
    expected = laws.generate(plain, tiny_inputs(2), **CALL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = laws.generate(model, tiny_inputs(2), **CALL)
    torch.testing.assert_close(output.logits[0], expected.logits[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before.logits[0], expected.logits[0], atol=1e-2)
    assert not model.is_prepared and any("Weights have changed since" in str(one.message) for one in caught)


def a_strict_call_is_refused_after_a_fused_step() -> None:
    model = model_with_heads()
    model.certify(certificate_for(model, SETTING, max_new_tokens=4))
    model.generate(**tiny_inputs(2), strict_certificate=True)
    fused_step(model)
    try:
        model.generate(**tiny_inputs(2), strict_certificate=True)
    except ValueError as error:
        assert "the weights are not the certified ones" in str(error)
    else:
        raise AssertionError("trained weights pass for the certified ones")


# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "exit_heads"], ids=["all weights", "exit heads"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_copy_is_right_after_a_fused_step(optimizer, part):
    a_copy_is_right_after_a_fused_step(optimizer, part)


def test_a_strict_call_is_refused_after_a_fused_step():
    a_strict_call_is_refused_after_a_fused_step()


def test_a_strict_call_is_refused_after_training_with_the_librarys_defaults(tmp_path):
    model = model_with_heads()
    model.certify(certificate_for(model, SETTING, max_new_tokens=4))
    model.save_pretrained(tmp_path / "certified")
    loaded = EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path / "certified").eval()
    for one in (model, loaded):
        if one is model:
            one.generate(**tiny_inputs(2), strict_certificate=True)
        trainer = make_trainer(one, tmp_path, trainer_class=Seq2SeqTrainer, max_steps=1)
        assert trainer.args.optim == "adamw_torch_fused"
        trainer.train()
        one.eval()
        with pytest.raises(ValueError, match="the weights are not the certified ones"):
            one.generate(**tiny_inputs(2), strict_certificate=True)
        with pytest.warns(CertificateWarning, match="the weights are not the certified ones"):
            one.generate(**tiny_inputs(2))


def test_a_step_of_another_model_costs_neither_copy_nor_certificate():
    """Optimizer steps of another model, such as a student, do not affect a prepared and certified teacher."""
    model = model_with_heads()
    certificate = certificate_for(model, SETTING, max_new_tokens=4)
    model.certify(dataclasses.replace(certificate, implementations=("prepared",)))
    model.prepare_for_generation()
    for _ in range(2):
        fused_step(torch.nn.Linear(4, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate(**tiny_inputs(2), strict_certificate=True)
        assert model.is_prepared and model._prepared_copy.marks == parameter_versions(model)


def test_training_mode_forgets_that_the_weights_were_known(monkeypatch):
    model = model_with_heads()
    model.certify(certificate_for(model, SETTING, max_new_tokens=4))
    model.generate(**tiny_inputs(2), strict_certificate=True)
    with torch.no_grad():
        model.lm_head.weight.data.mul_(2)  # the way mixed precision writes to weights
    model.train()
    model.eval()
    with pytest.raises(ValueError, match="the weights are not the certified ones"):
        model.generate(**tiny_inputs(2), strict_certificate=True)


def test_what_is_known_of_weights_stays_in_the_process():
    model = model_with_heads()
    model.certify(certificate_for(model, SETTING, max_new_tokens=4))
    model.generate(**tiny_inputs(2), strict_certificate=True)
    assert model._known_weights is not None
    assert copy.deepcopy(model)._known_weights is pickle.loads(pickle.dumps(model))._known_weights is None


def test_a_step_is_counted_once_and_when_it_fails():
    """A step increases the counter twice, before and after. More would mean that hooks are registered repeatedly."""
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
    before = parameter_versions(module).steps
    optimizer.step()
    assert parameter_versions(module).steps == before + 2

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails)
    assert parameter_versions(module).steps > before + 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_of_bits_notice_any_change(dtype):
    module = torch.nn.Linear(97, 33).to(dtype)
    sums = weights_sums(module)
    assert same_sums(sums, weights_sums(copy.deepcopy(module)))
    with torch.no_grad():
        for place in ((0, 0), (32, 96), (17, 3)):
            other = copy.deepcopy(module)
            other.weight[place].mul_(-1)
            assert not same_sums(sums, weights_sums(other))
        swapped = copy.deepcopy(module)
        swapped.weight[0, :2] = module.weight[0, [1, 0]]
        assert not same_sums(sums, weights_sums(swapped))
    flat = torch.randn(5000)
    for offset in (0, 1):  # with offset 1, memory is not aligned to 64-bit integers
        part = flat[offset : offset + 3000]
        holder = torch.nn.Module()
        holder.register_buffer("part", part)
        copied = torch.nn.Module()
        copied.register_buffer("part", part.clone())
        assert same_sums(weights_sums(holder), weights_sums(copied))
