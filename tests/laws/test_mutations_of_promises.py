"""Planted mutations of the detection of changes in weights, in modules and in certified conditions.

As in `test_mutations.py`, a mutation replaces one function by a wrong one, which a law must detect.
"""

from __future__ import annotations

import functools

import pytest

from hf_earlyexit import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.calibration import model_calibration
from hf_earlyexit.families.shipped import default_examples, load_default
from hf_earlyexit.families.t5 import structure as t5_structure
from hf_earlyexit.generation import certified, fingerprint, prepared
from hf_earlyexit.generation.certificate import Certificate
from tests.calibration import test_certified_use
from tests.generation import test_changed_modules, test_changed_weights
from tests.laws.test_mutations import swapped
from tests.parts import drawn


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


measured_ways = test_certified_use.a_prepared_call_is_not_covered_by_a_plain_measurement
measured_lengths = test_certified_use.longer_sources_are_not_covered
measured_batches = test_certified_use.rows_that_wait_are_covered_at_their_number_alone


def disagreements():
    with pytest.MonkeyPatch.context() as patch:
        test_certified_use.go_wrong(patch)
        test_certified_use.disagreements_count(load_default(), drawn(default_examples(), **test_certified_use.INPUTS))


def does_not_count_steps(monkeypatch):
    """Parameter versions without optimizer steps: only addresses and torch's version counters."""
    for module in (prepared, certified):
        marks = lambda model: fingerprint.parameter_versions(model)._replace(steps=0)  # noqa: E731
        monkeypatch.setattr(module, "parameter_versions", marks)


@swapped(prepared, "same_sums")
def takes_all_steps_for_other_models(same_sums):
    return lambda one, other: True


def looks_at_hooks_alone(monkeypatch):
    monkeypatch.setattr(EarlyExitT5ForConditionalGeneration, "structure_of", staticmethod(lambda model: ()))


@swapped(t5_structure, "_part")
def looks_at_kinds_of_modules_alone(part):
    return lambda module: type(module)


@swapped(certified, "implementation_of")
def takes_all_ways_for_rounding(implementation_of):
    return lambda model, config: "plain"


@swapped(Certificate, "uncovered")
def cannot_see_lengths(uncovered):
    return lambda self, implementation, source_tokens: uncovered(self, implementation, 0)


@swapped(certified, "_rows_of")
def takes_any_number_of_rows_for_the_certified_one(rows_of):
    return lambda call: 2


@swapped(model_calibration, "with_worst")
def lets_disagreements_pass(with_worst):
    return lambda table, agreement: table


@swapped(model_calibration, "agree")
def holds_each_way_against_itself_alone(agree):
    """Each implementation is compared with itself, which hides one that is wrong at full depth, too."""

    def mutant(table, writer, others, *call):
        other = next(iter(others.values()))
        return agree(table, other, others, *call)

    return mutant


MUTATIONS = [
    (does_not_count_steps, fresh_copy),
    (does_not_count_steps, strict),
    (takes_all_steps_for_other_models, fresh_copy),
    (looks_at_hooks_alone, same_modules),
    (looks_at_hooks_alone, same_settings),
    (looks_at_kinds_of_modules_alone, same_forwards),
    (looks_at_kinds_of_modules_alone, same_numbers),
    (takes_all_ways_for_rounding, measured_ways),
    (cannot_see_lengths, measured_lengths),
    (takes_any_number_of_rows_for_the_certified_one, measured_batches),
    (lets_disagreements_pass, disagreements),
    (holds_each_way_against_itself_alone, disagreements),
]


def name_of(law) -> str:
    return law.func.__name__ if isinstance(law, functools.partial) else law.__name__


@pytest.mark.parametrize("mutation, law", MUTATIONS, ids=name_of)
def test_the_law_notices(mutation, law, monkeypatch):
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        law()
