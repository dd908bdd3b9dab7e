"""Choice of exit points for hand-made time models with a known answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_earlyexit.speed.time_model import TimeModel
from hf_earlyexit.speed.tuning import ALL_SETS, all_sets, greedy, tune


FREE = TimeModel(
    criterion="softmax",
    scores=True,
    rows=(1, 8),
    layer=(1.0, 8.0),  # time grows with rows
    head=(0.0, 0.0),
    question=(0.0, 0.0),
    step=(0.0, 0.0),
    departure=0.0,
    payment=0.0,
    position=0.0,
    source=0.0,
)
# Of four tokens, two can exit after layer 2, one after layer 4 and one not at all.
TEXTS = [[2, 2, 4, 8]] * 4


def best(time_model: TimeModel, texts=TEXTS, points=(2, 4, 6), **keywords):
    return tune(time_model, texts, points, 8, **keywords).best


def test_where_asking_is_free_every_exit_that_is_used_is_asked():
    found = tune(FREE, TEXTS, (2, 4, 6), 8)
    assert found.full_depth.seconds == found.full_depth.mean_layers == 8.0
    assert set(found.best.exit_layers) >= {2, 4}
    assert found.ratio(found.best) == (2 + 2 + 4 + 8) / 4 / 8
    assert len(found.ranking) == 7
    assert [choice.seconds for choice in found.ranking] == sorted(choice.seconds for choice in found.ranking)


def test_a_dear_head_is_asked_at_fewer_exits():
    """The best set shrinks as the head gets more expensive.

    With exits at 2 and 4, the four tokens run 16 layers and the head 4 + 2 + 1 times. With an exit at 4 alone: 20
    layers and 4 + 1 times. At full depth: 32 layers and 4 times.
    """
    costs = {1.5: (2, 4), 3.0: (4,), 10.0: (4,), 13.0: None}
    for head, expected in costs.items():
        found = best(replace(FREE, head=(head, 8 * head)))
        assert (found and found.exit_layers) == expected
    found = tune(replace(FREE, head=(3.0, 24.0)), TEXTS, (2, 4, 6), 8)
    assert (found.full_depth.seconds, found.best.seconds) == (8 + 3, (20 + 5 * 3) / 4)


def test_a_criterion_that_reads_no_head_does_not_pay_for_it():
    assert best(replace(FREE, head=(5.0, 40.0), scores=False)).exit_layers[:2] == (2, 4)


def test_it_does_not_pay():
    assert best(replace(FREE, question=(7.0, 56.0))) is None
    assert best(replace(FREE, departure=9.0)) is None
    assert best(FREE, [[8, 8, 8]]) is None  # no token can exit


def test_it_does_not_pay_within_the_margin():
    """One token in 70 exits at 4 of 8 layers: a gain of 0.7 % is not enough; one in 20, 2.5 %, is."""
    assert best(FREE, [[8] * 69 + [4]]) is None
    assert best(FREE, [[8] * 19 + [4]]).exit_layers[0] in (2, 4)


def test_debts_are_paid_for():
    """Three in four tokens exit early and miss K/V in six layers; the fourth backfills all of them at once."""
    texts = [[2, 2, 2, 8] * 3]
    assert best(replace(FREE, payment=2.5), texts).seconds == (2 + 2 + 2 + 8 + 6 * 2.5) / 4
    assert best(replace(FREE, payment=3.5), texts) is None
    assert best(replace(FREE, position=1.1), texts) is None


def test_where_a_layer_takes_as_long_for_any_rows_a_batch_must_leave_together():
    """Rows run deep in turns, so in every step one row does, and weights are read once for all rows."""
    read_once = replace(FREE, layer=(1.0, 1.0))
    texts = [[2, 8] * 4, [8, 2] * 4]
    assert best(FREE, texts, batch_size=2).seconds == (2 + 8) / 2
    assert best(read_once, texts, batch_size=1) is not None
    assert best(read_once, texts, batch_size=2) is None
    assert best(read_once, [[2, 8] * 4] * 2, batch_size=2) is not None


def test_the_batch_rule_makes_everyone_wait():
    texts = [[2, 8] * 4, [8, 2] * 4]
    assert best(FREE, texts, batch_size=2, rule="batch") is None
    assert best(FREE, texts, batch_size=2, rule="row") is not None


def test_many_exit_points_are_taken_away_one_by_one():
    points = range(1, ALL_SETS + 2)
    texts = [[3, 14, 9, 3, 14, 9, 3]]
    found = tune(replace(FREE, question=(0.2, 1.6)), texts, points, 14)
    assert found.best.exit_layers == (3, 9)
    assert len(found.ranking) == len(points) * (len(points) + 1) // 2
    few = tune(replace(FREE, question=(0.2, 1.6)), texts, points[:ALL_SETS], 14)
    assert few.best.exit_layers == (3, 9) and len(few.ranking) == 2**ALL_SETS - 1


def test_sets():
    assert list(all_sets([4, 2])) == [(2,), (4,), (2, 4)]
    seen = list(greedy([1, 2, 3], lambda layers: _Sum(layers)))
    assert [one.exit_layers for one in seen] == [(1, 2, 3), (2, 3), (1, 3), (1, 2), (2,), (1,)]


class _Sum:
    def __init__(self, layers):
        self.exit_layers, self.seconds = layers, sum(layers)


def test_nothing_to_choose_from_is_refused():
    for texts, points in (([], (2,)), (TEXTS, ())):
        with pytest.raises(ValueError, match="must not be empty"):
            tune(FREE, texts, points, 8)
