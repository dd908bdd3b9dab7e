"""Bytes and FLOPs match values by hand, real modules and a real walk; comparison of measured to ideal times."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_earlyexit import EarlyExitConfig
from hf_earlyexit.exits.criteria import SoftmaxResponse
from hf_earlyexit.speed.machine_rates import MachineRates
from hf_earlyexit.speed.roofline import (
    CATCH_UP,
    CROSS,
    HEADS,
    LAYERS,
    REST,
    SOURCE,
    DecoderSizes,
    PartWork,
    compare,
    part_time,
    parts_of,
)
from hf_earlyexit.speed.simulation import batches_of, draw_layers, pieces_of, simulate
from hf_earlyexit.speed.timed_walk import Replay, source_states, walk
from tests.tiny import NUM_LAYERS, tiny_config, tiny_pair


SIZES = DecoderSizes(
    num_layers=2, d_model=3, inner=4, d_ff=5, ff_matrices=3, vocabulary=7, head_maps=(0, 0), value_bytes=2
)
RATES = MachineRates(
    bandwidth=10.0,
    working_set=1,
    working_bandwidth=100.0,
    product_rows=(1, 4),
    cached_rates=(10.0, 40.0),
    memory_rates=(1.0, 1.0),
    threads=1,
)


def work_of(sizes, walked, source) -> dict[str, PartWork]:
    return {part.name: part for part in parts_of(sizes, walked, source)}


def test_bytes_and_flops_by_hand():
    """Two rows: in step 1 both run layer 1 and one runs layer 2; in step 2 the other one runs layer 2 too."""
    work = work_of(SIZES, simulate(batches_of([[2], [1, 2]], 2), 2, (1,)), source=6)
    matrices, projection = 3 * (4 * 4 + 3 * 5), 2 * 3 * 4  # 93 and 24 numbers
    visits = [(2, 2), (1, 2), (1, 1), (1, 2)]  # rows, positions attended over: layer 1, then layer 2
    numbers = [matrices + 2 * 3 + 2 * 4 * (keys + rows) + 4 * 3 * rows for rows, keys in visits]
    assert work[LAYERS].bytes.tolist() == [2 * each for each in numbers] == [2 * 155, 2 * 135, 2 * 127, 2 * 135]
    assert work[LAYERS].flops.tolist() == [2 * rows * matrices + 4 * 4 * keys for rows, keys in visits]
    assert work[CROSS].bytes.tolist() == [2 * (projection + 3 + 2 * rows * (6 * 4 + 3)) for rows, _ in visits]
    assert work[CROSS].flops.tolist() == [2 * rows * (projection + 2 * 6 * 4) for rows, _ in visits]
    assert work[SOURCE].rows.tolist() == [12, 6, 6]  # both at layer 1; one, then the other at layer 2
    assert work[SOURCE].bytes.tolist() == [2 * (projection + each * (3 + 8)) for each in (12, 6, 6)]
    assert work[SOURCE].flops.tolist() == [2 * projection * each for each in (12, 6, 6)]
    assert work[CATCH_UP].rows.tolist() == [1]
    assert work[CATCH_UP].bytes.tolist() == [2 * (projection + 3 + 3 + 8)]
    assert work[CATCH_UP].flops.tolist() == [2 * projection]
    assert work[HEADS].rows.tolist() == [2, 1]
    assert work[HEADS].bytes.tolist() == [2 * (21 + 3 + rows * (3 + 7)) for rows in (2, 1)]
    assert work[HEADS].flops.tolist() == [2 * 21 * rows for rows in (2, 1)]


def test_a_criterion_that_looks_at_the_head_adds_heads_where_it_is_asked():
    script = batches_of([[2, 2, 1]], 1)
    plain = work_of(SIZES, simulate(script, 2, (1,)), 6)[HEADS]
    scored = work_of(SIZES, simulate(script, 2, (1,), scores=True), 6)[HEADS]
    assert (len(plain.rows), len(scored.rows)) == (3, 5)
    assert scored.flops.sum() == plain.flops.sum() * 5 / 3


@pytest.mark.parametrize("family", ("tied", "untied", "narrow heads"))
def test_weights_are_those_of_the_modules(family):
    _, model = tiny_pair(family)
    sizes = DecoderSizes.of(model.config, value_bytes=8)
    numbers = lambda *modules: sum(p.numel() for module in modules for p in module.parameters())  # noqa: E731
    block = model.decoder.block[1]  # block 0 also has the relative position bias, which a step does not read
    assert sizes.layer_matrices + 2 * sizes.d_model == numbers(block.layer[0], block.layer[2])
    assert 2 * sizes.projection + sizes.d_model == numbers(block.layer[1])
    read = NUM_LAYERS * (numbers(block) - sizes.projection)  # K and V of cross-attention are only used for the source
    assert sizes.weight_bytes == 8 * (read + numbers(model.decoder.final_layer_norm) + model.lm_head.weight.numel())


def test_exit_heads_count_their_maps():
    config = tiny_config(early_exit=None)
    config.early_exit = EarlyExitConfig((1, 2, 4, 5), ("norm", "linear", "mlp", "shortcut")).to_dict()
    assert DecoderSizes.of(config, 4).head_maps == (0, 1, 0, 2, 1, 0)
    sizes = DecoderSizes(2, 3, 4, 5, 3, 7, head_maps=(2, 0), value_bytes=2)
    heads = work_of(sizes, simulate(batches_of([[1, 2]], 1), 2, (1,)), 6)[HEADS]
    assert heads.bytes.tolist() == [2 * 2 * 9, 2 * (21 + 3 + 10), 2 * (21 + 3 + 10)]
    assert heads.flops.tolist() == [2 * 2 * 9, 2 * 21, 2 * 21]


@pytest.mark.parametrize("heads", ("norm", "linear", "mlp", "shortcut"))
@pytest.mark.parametrize("asked", (None, SoftmaxResponse()))
@pytest.mark.parametrize("rows", (1, 3))
def test_flops_are_those_of_a_real_walk(rows, asked, heads):
    """Torch counts exactly the same products: projections, attention, backfills, heads, the source."""
    _, model = tiny_pair("untied", early_exit=EarlyExitConfig((2, 3, 5), heads))
    model.set_attn_implementation("eager")  # torch counts the products of eager attention
    script = pieces_of(draw_layers([0, 0.4, 0.2, 0, 0.2, 0.2], rows, 12, seed=3), 1, rows, 12)[0]
    walked = simulate(script[None], NUM_LAYERS, (2, 3, 5), scores=asked is not None)
    work = work_of(DecoderSizes.of(model.config, 8), walked, source=7)
    with FlopCounterMode(display=False) as counted:
        walk(model, source_states(model, rows, 7), Replay(script, asked), (2, 3, 5))
    assert walked.owed.max() >= 2 and len(work[CATCH_UP].rows) > 3
    assert sum(part.flops.sum() for part in work.values()) == counted.get_total_flops()


def test_the_expected_catch_up_is_what_a_real_walk_pays():
    _, model = tiny_pair("tied", dtype=torch.float32)
    layers = draw_layers([0.5, 0.1, 0, 0.1, 0, 0.3], 4, 16, seed=5)
    script = pieces_of(layers, 1, 4, 16)[0]
    walked = simulate(script[None], NUM_LAYERS, (1, 2, 4))
    paid = walk(model, source_states(model, 4, 5), Replay(script), (1, 2, 4)).run.work_by_layer()
    assert walked.work_by_layer()["filled_positions"] == paid["filled_positions"].tolist()
    assert work_of(DecoderSizes.of(model.config, 4), walked, 5)[CATCH_UP].rows.sum() == paid["filled_positions"].sum()


# --- measured against ideal -----------------------------------------------------------------------------------------


def test_both_regimes_and_the_one_that_binds():
    """At 1 row memory takes longer, at 4 rows compute does; the ideal uses the longer one each time."""
    work = PartWork(LAYERS, np.array([1, 4]), np.array([1000, 1000]), np.array([50, 800]))
    part = part_time(work, RATES, seconds=100.0, tokens=2)
    assert (part.memory, part.compute, part.ideal) == (10.0, 12.5, (10 + 20) / 2)
    assert (part.bytes, part.flops, part.measured, part.loss) == (1000, 425, 50, 35)
    assert part.binds == "compute"
    assert part_time(PartWork(LAYERS, *work_at_one_row()), RATES, 1, 1).binds == "memory"


def work_at_one_row():
    return np.array([1]), np.array([1000]), np.array([50])


def test_rates_lie_on_a_line_between_those_measured():
    assert RATES.rate_at([1, 2, 4, 100]).tolist() == [10, 20, 40, 40]


def test_the_largest_loss_is_named_and_parts_add_up():
    work = [PartWork(name, *work_at_one_row()) for name in (LAYERS, CROSS, HEADS)]
    found = compare(work, RATES, {LAYERS: 30, CROSS: 12, HEADS: 41, REST: 8}, untimed=81, tokens=2)
    assert [part.name for part in found.parts] == [LAYERS, CROSS, HEADS, REST]
    assert (found.ideal, found.measured, found.timers) == (15.0, 45.5, 5.0)
    assert found.largest_loss.name == HEADS and found.largest_loss.loss == 20.5 - 5
    assert found.fraction == 15 / 40.5
    slow = PartWork(LAYERS, np.array([1]), np.array([8000]), np.array([50]))
    found = compare([slow, *work[1:]], RATES, {LAYERS: 90, CROSS: 10, HEADS: 41}, 141, 1)
    assert found.largest_loss.name == HEADS  # `slow` takes longest, but is close to its ideal
    assert compare(work, RATES, {LAYERS: 11, REST: 40}, 51, 2).largest_loss.name == REST


def test_rates_are_measured(monkeypatch):
    """Rates exist and are consistent; no claim about the machine."""
    monkeypatch.setattr("hf_earlyexit.speed.machine_rates.LARGE", 2**21)
    rates = MachineRates.measure(working_set=2**20)
    assert rates.bandwidth > 0 and rates.working_bandwidth >= rates.bandwidth
    assert len(rates.product_rows) == len(rates.cached_rates) == len(rates.memory_rates)
    assert min(rates.cached_rates + rates.memory_rates) > 0 and rates.threads == torch.get_num_threads()
