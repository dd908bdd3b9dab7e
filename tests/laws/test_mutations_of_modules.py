"""Planted mutations that read weights instead of calling the module.

As in `test_mutations.py`, a mutation replaces one function by a wrong one, which a law must detect.
"""

from __future__ import annotations

import functools

import pytest
from torch import nn

from hf_earlyexit.exits import heads
from hf_earlyexit.families.t5 import decoder as t5
from tests.laws import test_called_modules as called
from tests.laws.test_mutations import swapped


@swapped(t5, "is_plain_linear")
def takes_every_head_with_a_weight_for_plain(is_plain_linear):
    return lambda module: hasattr(module, "weight")


@swapped(t5, "is_plain_linear")
def looks_at_the_class_alone(is_plain_linear):
    return lambda module: type(module) is nn.Linear


def reads_the_map_of_a_shortcut(monkeypatch):
    forward = lambda self, hidden: self.norm(nn.functional.linear(hidden, self.map.weight))  # noqa: E731
    monkeypatch.setattr(heads.ShortcutHead, "forward", forward)


def reads_the_maps_of_a_classifier(monkeypatch):
    def forward(self, hidden):
        inner = nn.functional.linear(hidden, self.inner.weight, self.inner.bias).relu()
        return nn.functional.linear(inner, self.output.weight, self.output.bias).squeeze(-1)

    monkeypatch.setattr(heads.Classifier, "forward", forward)


@swapped(t5.T5Decoder, "_keys_values")
def reads_the_maps_of_keys_and_values(keys_values):
    def mutant(module, states):
        shape = (*states.shape[:-1], module.n_heads, module.key_value_proj_dim)
        return tuple(
            nn.functional.linear(states, getattr(one, "base_layer", one).weight).view(shape)
            for one in (module.k, module.v)
        )

    return staticmethod(mutant)


hooked_heads = functools.partial(called.candidates_are_what_the_head_says, called.hook)
adapted_heads = functools.partial(called.candidates_are_what_the_head_says, called.adapt)
hooked_maps = functools.partial(called.exits_are_what_their_modules_say, called.hook, "heads.3.map")
hooked_classifiers = functools.partial(
    called.exits_are_what_their_modules_say, called.hook, "classifiers.shared.inner"
)
hooked_keys = functools.partial(called.fills_follow_frozen_rows, called.hook)
adapted_keys = functools.partial(called.fills_follow_frozen_rows, called.adapt)

MUTATIONS = [
    (takes_every_head_with_a_weight_for_plain, adapted_heads),
    (looks_at_the_class_alone, hooked_heads),
    (reads_the_map_of_a_shortcut, hooked_maps),
    (reads_the_maps_of_a_classifier, hooked_classifiers),
    (reads_the_maps_of_keys_and_values, hooked_keys),
    (reads_the_maps_of_keys_and_values, adapted_keys),
]


@pytest.mark.parametrize("mutation, law", MUTATIONS, ids=lambda one: getattr(one, "__name__", "law"))
def test_the_law_notices(mutation, law, monkeypatch):
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        law()
