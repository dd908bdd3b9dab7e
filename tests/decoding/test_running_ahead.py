"""When to enqueue the layers after an exit point before the exit decision is known."""

from __future__ import annotations

from hf_earlyexit.decoding.running_ahead import RunningAhead


def test_it_is_worth_it_until_rows_leave_often():
    ahead = RunningAhead()
    assert ahead.is_worth_it(2)
    for _ in range(3):
        ahead.see(2, someone_went_on=False)
    assert not ahead.is_worth_it(2) and ahead.is_worth_it(4), "each exit point has its own"
    for _ in range(3):
        ahead.see(2, someone_went_on=True)
    assert ahead.is_worth_it(2), "it comes back"


def test_the_average_follows_the_share_of_cases():
    for lost, expected in ((1, True), (2, False)):
        ahead = RunningAhead()
        for case in range(200):
            ahead.see(1, someone_went_on=case % 5 >= lost)
        assert [ahead.lost[1] < 0.3, ahead.lost[1] > 0.3] == [expected, not expected]
