"""Arguments that verbs share: certified values are applied, and deviations from them are reported."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from hf_earlyexit.cli.arguments import rows_at_once, source_cut
from tests.certificates import certificate_for
from tests.tiny import tiny_pair


SETTING = {"exit_criterion": "softmax", "exit_threshold": 0.5}


@pytest.fixture(scope="module")
def certificate():
    return certificate_for(tiny_pair.shared("tied", 1, torch.float32)[1], SETTING)


def certified(certificate, cut: int | None, rows: int | None = None, is_certified: bool = True) -> Namespace:
    """A stand-in for a model, with the attributes that are read."""
    data, generation = certificate.data | {"max_source_tokens": cut}, certificate.generation | {"batch_size": rows}
    return Namespace(exit_certificate=replace(certificate, data=data, generation=generation, certified=is_certified))


@pytest.mark.parametrize(
    ("cut", "given", "expected", "said"),
    (
        (14, None, 14, "as certified, inputs are cut to 14 tokens"),
        (14, 14, 14, ""),
        (14, 20, 20, "not as certified: --max-source-tokens 20 (certified: 14)"),
        (14, 9, 9, "not as certified: --max-source-tokens 9 (certified: 14)"),
        (None, 9, 9, "not as certified: --max-source-tokens 9 (certified: inputs uncut)"),
        (None, None, None, ""),
    ),
)
def test_inputs_are_cut_as_certified_or_it_is_said(certificate, capsys, cut, given, expected, said):
    model = certified(certificate, cut)
    assert source_cut(Namespace(max_source_tokens=given), model) == expected
    err = capsys.readouterr().err
    assert err.startswith(said) and bool(err) == bool(said)
    for other in (Namespace(exit_certificate=None), certified(certificate, cut, is_certified=False)):
        assert source_cut(Namespace(max_source_tokens=given), other) == given
        assert capsys.readouterr().err == ""


def test_batches_are_as_certified(certificate):
    assert rows_at_once(Namespace(batch_size=None), certified(certificate, None, 3), 8) == 3
    assert rows_at_once(Namespace(batch_size=5), certified(certificate, None, 3), 8) == 5
    assert rows_at_once(Namespace(batch_size=None), certified(certificate, None), 8) == 8
    assert rows_at_once(Namespace(batch_size=None), Namespace(exit_certificate=None), 8) == 8
