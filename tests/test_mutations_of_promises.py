"""Planted mutations of what notices changes: of weights, of modules, of what a certificate is about.

As in `test_mutations.py`: a mutation replaces one function by a wrong one, which a law must notice.
"""

from __future__ import annotations

import functools

import pytest

from hf_earlyexit import EarlyExitT5ForConditionalGeneration, certified, fingerprint, prepared, t5_structure
from tests import test_changed_modules, test_changed_weights
from tests.test_mutations import swapped


fresh_copy = test_changed_weights.a_copy_is_right_after_a_fused_step
strict = test_changed_weights.a_strict_call_is_refused_after_a_fused_step


same_modules = functools.partial(
    test_changed_modules.a_copy_goes_with_what_it_was_made_of, test_changed_modules.replace_an_activation
)
same_forwards = functools.partial(
    test_changed_modules.a_copy_goes_with_what_it_was_made_of, test_changed_modules.replace_a_forward
)
same_numbers = functools.partial(
    test_changed_modules.a_copy_goes_with_what_it_was_made_of, test_changed_modules.raise_an_epsilon
)
same_settings = functools.partial(
    test_changed_modules.a_copy_goes_with_what_it_was_made_of, test_changed_modules.flip_the_scale
)


def does_not_count_steps(monkeypatch):
    """Where weights lie and what torch counts, alone."""
    for module in (prepared, certified):
        marks = lambda model: fingerprint.weights_marks(model)._replace(steps=0)  # noqa: E731
        monkeypatch.setattr(module, "weights_marks", marks)


@swapped(prepared, "same_sums")
def takes_all_steps_for_other_models(same_sums):
    return lambda one, other: True


def looks_at_hooks_alone(monkeypatch):
    monkeypatch.setattr(EarlyExitT5ForConditionalGeneration, "structure_of", staticmethod(lambda model: ()))


@swapped(t5_structure, "_part")
def looks_at_kinds_of_modules_alone(part):
    return lambda module: type(module)


MUTATIONS = [
    (does_not_count_steps, fresh_copy),
    (does_not_count_steps, strict),
    (takes_all_steps_for_other_models, fresh_copy),
    (looks_at_hooks_alone, same_modules),
    (looks_at_hooks_alone, same_settings),
    (looks_at_kinds_of_modules_alone, same_forwards),
    (looks_at_kinds_of_modules_alone, same_numbers),
]


def name_of(law) -> str:
    return law.func.__name__ if isinstance(law, functools.partial) else law.__name__


@pytest.mark.parametrize("mutation, law", MUTATIONS, ids=name_of)
def test_the_law_notices(mutation, law, monkeypatch):
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        law()
