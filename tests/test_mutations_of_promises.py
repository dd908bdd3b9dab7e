"""Planted mutations of what notices changes: of weights, of modules, of what a certificate is about.

As in `test_mutations.py`: a mutation replaces one function by a wrong one, which a law must notice.
"""

from __future__ import annotations

import functools

import pytest

from hf_earlyexit import certified, fingerprint, prepared
from tests import test_changed_weights
from tests.test_mutations import swapped


fresh_copy = test_changed_weights.a_copy_is_right_after_a_fused_step
strict = test_changed_weights.a_strict_call_is_refused_after_a_fused_step


def does_not_count_steps(monkeypatch):
    """Where weights lie and what torch counts, alone."""
    for module in (prepared, certified):
        marks = lambda model: fingerprint.weights_marks(model)._replace(steps=0)  # noqa: E731
        monkeypatch.setattr(module, "weights_marks", marks)


@swapped(prepared, "same_sums")
def takes_all_steps_for_other_models(same_sums):
    return lambda one, other: True


MUTATIONS = [
    (does_not_count_steps, fresh_copy),
    (does_not_count_steps, strict),
    (takes_all_steps_for_other_models, fresh_copy),
]


def name_of(law) -> str:
    return law.func.__name__ if isinstance(law, functools.partial) else law.__name__


@pytest.mark.parametrize("mutation, law", MUTATIONS, ids=name_of)
def test_the_law_notices(mutation, law, monkeypatch):
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        law()
