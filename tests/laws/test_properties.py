"""Under any script, lazy, eager and a slow reference that runs every layer with frozen rows are equal."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from hf_earlyexit import EarlyExitCache
from hf_earlyexit.kernels.rows import Rows
from tests import laws
from tests.tiny import ENDS, NUM_LAYERS, tiny_inputs, tiny_pair


STEPS = 9
EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@lru_cache
def pair(family: str):
    return tiny_pair(family, 2)


@pytest.mark.parametrize("family", ("tied", "untied"))
@EXAMPLES
@given(data=some.data())
def test_any_script(family, data):
    batch_size = data.draw(some.sampled_from((1, 2, 5)), "rows")
    depth = some.integers(1, NUM_LAYERS)
    exits = data.draw(
        some.lists(some.lists(depth, min_size=STEPS, max_size=STEPS), min_size=batch_size, max_size=batch_size)
    )
    ends = data.draw(some.sampled_from(([96], ENDS)), "ends")
    stock, model = pair(family)
    lazy, eager = laws.follows_frozen_rows(
        stock, model, tiny_inputs(batch_size, 2), lambda row, position: exits[row][position], 2, STEPS, ends
    )
    assert_debts_are_accounted(lazy, eager)


def assert_debts_are_accounted(lazy, eager) -> None:
    """Eager fills every skipped layer of every token; lazy has filled or still lacks each of them."""
    skipped = (
        (lazy.layers_run[:, :, None] < torch.arange(1, NUM_LAYERS + 1)) & (lazy.layers_run[:, :, None] > 0)
    ).sum((0, 1))
    assert torch.equal(eager.filled_positions, skipped)
    cache = lazy.cache
    owed = torch.tensor(
        [sum(length - filled for length, filled in zip(cache.lengths, layer)) for layer in cache.filled]
    )
    assert torch.equal(lazy.filled_positions + owed, skipped)
    assert all(
        shallow >= deep for upper, lower in zip(cache.filled, cache.filled[1:]) for shallow, deep in zip(upper, lower)
    )


@EXAMPLES
@given(data=some.data())
def test_arena_keeps_what_was_written(data):
    """Every row reads back what it wrote, for rows of different lengths written in any order to a growing arena."""
    cache = EarlyExitCache(1, 3, 2, 4, capacity=data.draw(some.integers(1, 4)))
    written = [torch.empty(2, 0, 4) for _ in range(3)]
    for _ in range(data.draw(some.integers(1, 12))):
        rows = Rows(sorted(data.draw(some.sets(some.integers(0, 2), min_size=1))), 3)
        length = data.draw(some.integers(1, 3))
        new = torch.randn(len(rows), 2, length, 4)
        cache.reserve(rows, length)
        cache.write(1, rows, new, -new)
        cache.advance(rows, length)
        for place, row in enumerate(rows):
            written[row] = torch.cat([written[row], new[place]], dim=1)
    for row, expected in enumerate(written):
        keys, values = cache.view(1, Rows([row], 3), cache.lengths[row])
        assert torch.equal(keys[0], expected) and torch.equal(values[0], -expected)
