"""A hand-made time model predicts walks, and fitting recovers the parts from times made of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hf_earlyexit import EarlyExitConfig
from hf_earlyexit.exits.criteria import SoftmaxResponse
from hf_earlyexit.speed.roofline import CATCH_UP, CROSS, HEADS, LAYERS, REST, SOURCE
from hf_earlyexit.speed.simulation import batches_of, simulate
from hf_earlyexit.speed.time_model import TimeModel, measure_time_model, rounds_in_all, rows_to_time, solve, trials_for
from tests.tiny import tiny_pair


BY_HAND = TimeModel(
    criterion="softmax",
    scores=True,
    rows=(1, 2, 4),
    layer=(10, 14, 22),
    head=(100, 140, 220),
    question=(1, 2, 4),
    step=(1000, 1500, 2500),
    departure=0.5,
    payment=0.25,
    position=0.125,
    source=50,
)


def test_a_walk_by_hand():
    """Rows exit after 1 and 3, then after 3 and 1 of 3 layers, so one row visits layer 2 in each step."""
    walked = simulate(batches_of([[1, 3], [3, 1]], 2), 3, (1,), scores=True)
    assert BY_HAND.seconds(walked) == {
        "layers": 2 * 14 + 4 * 10,
        "heads": 2 * 140 + 2 * 100,
        "questions": 2 * 2 + 2 * 0.5,
        "catch-up": 2 * (0.25 + 0.125),  # the first row misses one position at two layers
        "source": 6 * 50,
        "steps": 2 * 1500,
    }
    assert BY_HAND.per_token(walked) == sum(BY_HAND.seconds(walked).values()) / 4


def test_rows_that_nobody_has_scored_share_a_product_with_the_head():
    walked = simulate(batches_of([[1, 3], [3, 1]], 2), 3, (1,))
    assert BY_HAND.seconds(walked)["heads"] == 2 * 140


def test_rows_lie_on_a_line_between_those_timed():
    assert BY_HAND.at(BY_HAND.layer, np.array([0, 1, 2, 3, 4])).tolist() == [0, 10, 14, 18, 22]


def test_json_and_back():
    assert TimeModel.from_dict(json.loads(json.dumps(BY_HAND.to_dict()))) == BY_HAND
    with pytest.raises(ValueError, match="TimeModel has no"):
        TimeModel.from_dict({**BY_HAND.to_dict(), "colour": 3})


@pytest.mark.parametrize("rows", (1, 4))
def test_the_parts_are_found_in_times_that_are_made_of_them(rows):
    """Trials timed by a machine that follows the model give the model back, without the cost of timers."""
    _, model = tiny_pair("tied", early_exit=EarlyExitConfig((2, 3, 5)))
    trials = trials_for(model, SoftmaxResponse(), True, rows, new_tokens=24)
    layer, timer, head, step, loop, source = 10.0, 0.5, 100.0, 1000.0, 300.0, 7.0
    question, replayed, departure, payment, position, lookup = 3.0, 1.0, 2.0, 5.0, 0.25, 0.125

    def parts_of(trial) -> dict[str, float]:
        work = trial.work
        visits, paid = int((work.rows > 0).sum()), int((work.owed > 0).sum())
        asks = question if trial.script.asked else replayed
        return {
            LAYERS: visits * (layer - lookup - 4 + timer),
            CROSS: visits * 4.0,
            CATCH_UP: (visits - paid) * lookup + payment * paid + position * int(work.owed.sum()),
            SOURCE: source * int(work.newcomers.sum()),
            HEADS: head * int((work.head_products > 0).sum()),
            REST: loop * work.steps
            + asks * int((work.questions > 0).sum())
            + departure * int((work.departed[:-1] > 0).sum()),
        }

    times = {name: parts_of(trial) for name, trial in trials.items()}
    visits, steps = int((trials["never"].work.rows > 0).sum()), trials["never"].work.steps
    untimed = sum(times["never"].values()) - visits * timer
    found = solve(trials, times, {"untimed": untimed, "generate": untimed + steps * (step - loop)})
    expected = {"layer": layer, "head": head, "question": question, "step": step, "departure": departure}
    expected |= {"payment": payment, "position": position, "source": source}
    assert found == pytest.approx(expected)


def test_a_time_model_of_a_real_model():
    """Each part has a value for every row count.

    Parts that are measured directly take some time. Differences of two measured times can be anything around 0 for
    layers this small.
    """
    _, model = tiny_pair("tied", dtype=torch.float32, early_exit=EarlyExitConfig((2, 4)))
    rounds = []
    found = measure_time_model(
        model,
        "softmax",
        batch_size=3,
        source=5,
        new_tokens=14,
        rounds=2,
        after_round=lambda: rounds.append(1),
    )
    assert found.rows == (1, 2, 3) and found.scores and found.criterion == "softmax"
    assert all(len(part) == 3 for part in (found.layer, found.head, found.question, found.step))
    assert min(*found.head, found.source) > 0 and min(*found.question, *found.step, found.departure) >= 0
    assert len(rounds) == rounds_in_all(3, 2) == 6
    assert not measure_time_model(model, "state", new_tokens=14, source=5, rounds=1).scores


def test_rows_are_timed_at_powers_of_two_and_at_the_batch():
    assert [rows_to_time(size) for size in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]
