"""Without optional kernels, a prepared copy has the same output and calls none of them."""

from __future__ import annotations

import pytest
import torch

from hf_earlyexit.kernels import packing
from hf_earlyexit.kernels.kernel_switch import SWITCH, optional_kernels
from tests import laws
from tests.tiny import tiny_inputs, tiny_pair


SOFTMAX = {"exit_criterion": "softmax", "exit_threshold": 0.1}


def test_the_variable(monkeypatch):
    for value, expected in ((None, True), ("1", True), ("0", False)):
        monkeypatch.delenv(SWITCH, raising=False) if value is None else monkeypatch.setenv(SWITCH, value)
        assert optional_kernels() == expected
    monkeypatch.setenv(SWITCH, "off")
    with pytest.raises(ValueError, match=f"`{SWITCH}` must be 0 or 1, got 'off'"):
        optional_kernels()


def test_without_them_none_is_called(monkeypatch):
    monkeypatch.setattr(packing, "SMALLEST_PACKED", 0)
    _, model = tiny_pair("untied", 2, torch.float32)
    plain = laws.generate(model, tiny_inputs(4, 2), 2, **SOFTMAX)
    kinds = {}
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    for value in ("1", "0"):
        monkeypatch.setenv(SWITCH, value)
        output = laws.generate(model.prepare_for_generation(), tiny_inputs(4, 2), 2, **SOFTMAX)
        assert torch.equal(output.sequences, plain.sequences) and torch.equal(output.layers_run, plain.layers_run)
        layer = model._prepared_copy.weights.layers[0]
        activation = model.decoder.block[0].layer[2].DenseReluDense.act
        kinds[value] = layer.feed_in.is_packed, layer.activation is activation
    assert kinds == {"1": (torch.backends.mkldnn.is_available(), False), "0": (False, True)}


def test_packing_follows_torchs_own_switch(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not packing.packs(torch.float32, torch.device("cpu"))


def test_what_no_kernel_multiplies_is_not_packed(monkeypatch):
    """oneDNN may be restricted to fewer instructions than the processor has (`ONEDNN_MAX_CPU_ISA`), so a kernel must
    be found by trying."""

    def refuses(*args):
        raise RuntimeError("could not create a primitive descriptor for the matmul primitive")

    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    monkeypatch.delenv(SWITCH, raising=False)
    packing.multiplies_packed.cache_clear()
    try:
        monkeypatch.setattr(packing, "packed_product", refuses)
        assert not packing.packs(torch.float32, torch.device("cpu"))
    finally:
        packing.multiplies_packed.cache_clear()
