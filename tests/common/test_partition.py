"""The part of an input does not depend on other inputs, and only open parts are read by default."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from hf_earlyexit.common.data import Example
from hf_earlyexit.common.partition import OPEN, PARTS, SHARES, Partition


MANY = [Example(f"input {number}") for number in range(2000)]


def grouped(count: int = 300, per_group: int = 3) -> list[Example]:
    return [Example(f"input {number}", (), f"group {number // per_group}") for number in range(count)]


def test_parts_have_their_shares():
    counts = {name: len(part) for name, part in Partition().split(MANY).items()}
    assert list(counts) == list(PARTS) and sum(counts.values()) == len(MANY)
    for name, share in zip(PARTS, SHARES):
        error = math.sqrt(share * (1 - share) * len(MANY))
        assert abs(counts[name] - share * len(MANY)) < 4 * error


def test_a_unit_is_in_one_part_and_its_inputs_stand_together():
    parts = Partition().split(grouped())
    units = [{one.unit for one in part} for part in parts.values()]
    assert sum(map(len, units)) == len(set.union(*units)) == 100
    for part in parts.values():
        places = [one.unit for one in part]
        assert sum(a != b for a, b in pairwise(places)) == len(set(places)) - 1


def test_the_part_of_an_input_depends_on_no_other_input():
    """A file, its first rows, and a larger file agree."""
    partition = Partition()
    whole = partition.split(MANY)
    for some in (MANY[:500], MANY[::-7], MANY[:1]):
        for name, part in partition.split(some).items():
            assert part == [one for one in whole[name] if one in some]


def test_no_order_and_no_number_of_inputs_tells_of_parts():
    """Parts keep their shares in any prefix of the order. Regression: the first inputs were once all in one part."""
    first = Partition().in_order(MANY, 400)
    counts = {name: len(part) for name, part in Partition().split(first).items()}
    for name, share in zip(PARTS, SHARES):
        assert abs(counts[name] - share * 400) < 4 * math.sqrt(share * (1 - share) * 400)
    assert first != MANY[:400] and Partition().in_order(MANY[::-1], 400) == first


def test_units_are_taken_whole():
    taken = Partition().in_order(grouped(), 10)
    assert len(taken) == 9 and len({one.unit for one in taken}) == 3


def test_large_units_are_as_likely_as_small_ones():
    """Which units are taken depends on their order and number alone; leaving out those that do not fit would not."""
    sizes = [300 if number % 10 == 0 else 1 for number in range(200)]
    examples = [Example(f"{unit}: {one}", (), str(unit)) for unit, size in enumerate(sizes) for one in range(size)]
    alone = [Example(f"{unit}", (), str(unit)) for unit in range(200)]
    for at_most in (1, 62, 620, 3100, 6180, 10_000):
        taken = list(dict.fromkeys(one.unit for one in Partition().in_order(examples, at_most)))
        count = min(200, max(1, at_most * 200 // len(examples)))
        assert taken == [one.unit for one in Partition().in_order(alone)][:count]
    shares = [sum(one.unit.endswith("0") for one in Partition(str(salt)).in_order(alone, 20)) for salt in range(50)]
    assert abs(sum(shares) / 50 - 2) < 4 * math.sqrt(20 * 0.1 * 0.9 / 50)


def test_another_salt_is_another_partition():
    one, other = Partition(), Partition("another")
    both = [example for example in one.keep(MANY, ["calibrate"]) if other.part_of(example.unit) == "calibrate"]
    assert abs(len(both) - 0.16 * len(MANY)) < 4 * math.sqrt(0.16 * 0.84 * len(MANY))


def test_other_shares_leave_calibrate_inputs_unread():
    """Open parts grow from one end of the hash range, and the calibrate part from the other end."""
    looked_at = Partition(shares=dict(zip(PARTS, (0.2, 0.4, 0.3, 0.1)))).keep(MANY)
    assert not {*looked_at} & {*Partition().keep(MANY, ["calibrate"])}


def test_shares_need_not_be_everything():
    parts = Partition(shares=dict(zip(PARTS, (0, 0.1, 0.2, 0.1)))).split(MANY)
    assert not parts["explore"] and 600 < sum(map(len, parts.values())) < 1000


def test_what_is_kept():
    partition = Partition()
    assert {partition.part_of(one.unit) for one in partition.keep(MANY)} == {*OPEN}
    assert {partition.part_of(one.unit) for one in partition.keep(MANY, ["report"])} == {"report"}
    assert partition.keep([]) == []
    hidden = partition.keep(MANY, ["calibrate"])[:3]
    with pytest.raises(ValueError, match=r"None of 3 inputs is in the parts that are read, \['explore', 'select'\]"):
        partition.keep(hidden)


@pytest.mark.parametrize("parts", ("select", [], ["select", "test"]))
def test_parts_that_are_none(parts):
    with pytest.raises(ValueError, match="`parts` must name some of"):
        Partition().keep(MANY, parts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"salt": ""}, "`salt` must be a text that is not empty, got ''"),
        ({"salt": None}, "`salt` must be a text"),
        ({"shares": {"calibrate": 1.0}}, "`shares` must be numbers for"),
        ({"shares": dict(zip(PARTS, (0.5, 0.2, 0.4, 0.3)))}, "together at most 1"),
        ({"shares": dict(zip(PARTS, (-0.1, 0.2, 0.4, 0.3)))}, "`shares` must be numbers for"),
        ({"shares": dict(zip(PARTS, ("a", 0.2, 0.4, 0.3)))}, "`shares` must be numbers for"),
        ({"shares": (0.1, 0.2, 0.4, 0.3)}, "`shares` must be numbers for"),
    ],
)
def test_partitions_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        Partition(**arguments)
