"""`EarlyExitCache`: keys, values, kept states and missing positions when the batch changes."""

from __future__ import annotations

import pytest
import torch

from hf_earlyexit import EarlyExitCache
from hf_earlyexit.decoding.layers import run_layers
from hf_earlyexit.decoding.run import ExitRun
from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.families.t5.decoder import T5Decoder
from hf_earlyexit.kernels.rows import Rows
from tests.tiny import NUM_LAYERS, tiny_inputs, tiny_pair
from tests.watching import Scripted


LAYERS, ROWS, HEADS, WIDTH, HIDDEN = 3, 4, 2, 5, 6


def project(layer: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that encode the state and the layer they were made from."""
    keys = states[:, :1, None].expand(-1, HEADS, WIDTH) * 10 + layer
    return keys, -keys


def project_source(layer: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    keys = (states[..., 0] * 100 + layer)[:, None, :, None].expand(-1, HEADS, -1, WIDTH)
    return keys, -keys


def state_of(row: int, position: int) -> torch.Tensor:
    return torch.full((HIDDEN,), float(10 * row + position))


def filled_cache(**options) -> EarlyExitCache:
    """Three positions: row 0 at full depth, row 1 exited after layer 1, row 2 after layer 2, row 3 after layer 1
    except at the last position."""
    cache = EarlyExitCache(LAYERS, ROWS, HEADS, WIDTH, capacity=2, **options)
    cache.attach_encoder(torch.arange(ROWS, dtype=torch.float32)[:, None, None].expand(-1, 7, HIDDEN).clone())
    for position in range(3):
        depths = [3, 1, 2, 3 if position == 2 else 1]
        everyone = Rows.everyone(ROWS)
        cache.reserve(everyone)
        for layer in range(1, LAYERS + 1):
            rows = Rows([row for row in everyone if depths[row] >= layer], ROWS)
            cache.backfill(layer, rows, project)
            cache.fill_cross(layer, rows, project_source)
            states = torch.stack([state_of(row, position) for row in rows])
            keys, values = project(layer, states)
            cache.write(layer, rows, keys[:, :, None], values[:, :, None])
            leaving = [place for place, row in enumerate(rows) if depths[row] == layer < LAYERS]
            if leaving:
                cache.keep(rows.choose(leaving), states[leaving])
        cache.advance(everyone)
    return cache


def assert_row_is(cache: EarlyExitCache, row: int, was: int, length: int = 3) -> None:
    """Assert that row `row` equals row `was` of a `filled_cache` after backfill."""
    one = Rows([row], cache.num_rows)
    for layer in range(1, LAYERS + 1):
        cache.backfill(layer, one, project)
        cache.fill_cross(layer, one, project_source)
        keys, values = cache.view(layer, one, length)
        expected = torch.tensor([10 * (10.0 * was + position) + layer for position in range(length)])
        assert torch.equal(keys[0, 0, :, 0], expected) and torch.equal(values[0, 1, :, 2], -expected)
        cross, _ = cache.cross_view(layer, one)
        assert (cross == 100 * was + layer).all()


def test_debts_are_recorded_and_paid_at_once():
    cache = filled_cache()
    assert cache.lengths == [3] * 4 and cache.capacity >= 3
    assert cache.filled == [[3, 3, 3, 3], [3, 0, 3, 3], [3, 0, 0, 3]]
    assert cache.backfill(3, Rows([1, 2], ROWS), project) == 6
    assert cache.backfill(3, Rows([1, 2], ROWS), project) == 0
    for row in range(ROWS):
        assert_row_is(cache, row, row)


def test_crop_forgets_debts_and_keeps_the_source():
    cache = filled_cache()
    cache.crop(-1)
    assert cache.lengths == [2] * 4 and cache.filled[1] == [2, 0, 2, 2]
    cache.crop([0, -1, 0, -2])
    assert cache.lengths == [2, 1, 2, 0] and cache.get_seq_length() == 2
    assert_row_is(cache, 1, 1, length=1)
    for bad in (1, [0, 0, 0, 1], [0, 0]):
        with pytest.raises(ValueError, match="tokens_to_remove"):
            cache.crop(bad)


@pytest.mark.parametrize("rows_per_prompt", (1, 2))
def test_reorder(rows_per_prompt):
    cache = filled_cache()
    cache.prompts = [row // rows_per_prompt for row in range(ROWS)]
    if rows_per_prompt == 2:
        cache.encoder_states[1], cache.encoder_states[3] = cache.encoder_states[0], cache.encoder_states[2]
    sources = [1, 1, 3, 2]
    debts = [[layer[source] for source in sources] for layer in cache.filled]
    cross_before = cache.cross_keys[0]
    cache.reorder_cache(torch.tensor(sources))
    assert cache.filled == debts
    assert (cache.cross_keys[0] is cross_before) == (rows_per_prompt == 2), "beams of a prompt share their source"
    if rows_per_prompt == 1:
        for row, source in enumerate(sources):
            assert_row_is(cache, row, source)
    else:
        cache.backfill(3, Rows.everyone(ROWS), project)
        for row, source in enumerate(sources):
            assert (
                cache.keys[2, row, 0, :3, 0] == torch.tensor([100.0 * source + 10 * at + 3 for at in range(3)])
            ).all()


def test_select_and_repeat():
    cache = filled_cache()
    cache.batch_select_indices(torch.tensor([3, 1, 1]))
    assert cache.num_rows == 3 and cache.lengths == [3] * 3
    cache.batch_repeat_interleave(2)
    for row, was in enumerate((3, 3, 1, 1, 1, 1)):
        assert_row_is(cache, row, was)


def test_reset_and_nbytes():
    cache = EarlyExitCache(LAYERS, ROWS, HEADS, WIDTH, capacity=8, dtype=torch.float16)
    assert cache.nbytes == 2 * LAYERS * ROWS * HEADS * 8 * WIDTH * 2
    cache = filled_cache()
    arena, bytes_in_use = cache.keys, cache.nbytes
    cross = sum(tensor.nbytes for tensor in (*cache.cross_keys, *cache.cross_values))
    assert bytes_in_use == 2 * cache.keys.nbytes + cache.kept.nbytes + cross and cross > 0
    cache.reset()
    assert cache.keys is arena and cache.get_seq_length() == 0 and cache.nbytes == bytes_in_use - cross
    assert cache.encoder_states is None and not any(map(any, cache.filled))


def test_bad_options_are_refused():
    for options, name in (({"fill": "later"}, "fill"), ({"filling": "recompute"}, "filling")):
        with pytest.raises(ValueError, match=name):
            EarlyExitCache(LAYERS, ROWS, HEADS, WIDTH, **options)


@pytest.mark.parametrize("script", (lambda row, at: 1 + (row + at) % NUM_LAYERS, lambda row, at: NUM_LAYERS))
def test_rows_of_different_lengths_walk_as_they_would_alone(script):
    """Rows of different lengths step together as they would alone; plain `generate` never does this, verification
    will."""
    _, model = tiny_pair("untied", 8)
    inputs, lengths = tiny_inputs(3, 8), [1, 4, 7]
    ids = torch.randint(4, 97, (3, 8), generator=torch.Generator().manual_seed(8))
    states = model.encoder(**inputs).last_hidden_state.detach()

    def walk(rows: list[int], batch_size: int, cache, decoder, run, at: list[int]):
        these = Rows(rows, batch_size)
        cache.reserve(these)
        decoder.begin_step(these, cache, 1)
        hidden = decoder.embed(ids[:, :1], these).new_zeros(len(rows), 1, 32)
        for place, position in enumerate(at):
            source = rows[place] if batch_size == 3 else SOLO[0]
            hidden[place, 0] = model.shared.weight[ids[source, position]]
        run.begin_step(1)
        return run_layers(decoder, hidden, cache, run, these)

    def begin(states, mask, shift=0):
        cache = EarlyExitCache(NUM_LAYERS, len(states), 4, 8, dtype=torch.float64, capacity=2)
        cache.attach_encoder(states)
        settings = ExitSettings(True, Scripted(lambda row, at: script(row + shift, at)), 0.5)
        run = ExitRun(settings, frozenset(range(1, NUM_LAYERS)), NUM_LAYERS, len(states), 99, "cpu")
        return cache, T5Decoder(model, cache, mask, None), run

    SOLO = [0]
    with torch.no_grad():
        together = begin(states, inputs["attention_mask"])
        for position in range(max(lengths)):
            rows = [row for row in range(3) if position < lengths[row]]
            walk(rows, 3, *together, [position] * len(rows))
        exited = walk([0, 1, 2], 3, *together, lengths)
        left = {row: (d.layer, d.hidden[place]) for d in exited for place, row in enumerate(d.rows)}
        for row in range(3):
            SOLO[0] = row
            alone = begin(states[row : row + 1], inputs["attention_mask"][row : row + 1], shift=row)
            for position in range(lengths[row]):
                walk([0], 1, *alone, [position])
            (one,) = walk([0], 1, *alone, [lengths[row]])
            assert one.layer == left[row][0]
            torch.testing.assert_close(one.hidden[0], left[row][1])
