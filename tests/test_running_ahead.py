"""When it is worth it to enqueue what lies behind an exit point before it is known who leaves there."""

from __future__ import annotations

from hf_earlyexit.running_ahead import RunningAhead


def test_it_is_worth_it_until_rows_leave_often():
    ahead = RunningAhead()
    assert ahead.is_worth_it(2)
    for _ in range(3):
        ahead.see(2, someone_went_on=False)
    assert not ahead.is_worth_it(2) and ahead.is_worth_it(4), "each exit point has its own"
    for _ in range(3):
        ahead.see(2, someone_went_on=True)
    assert ahead.is_worth_it(2), "it comes back"


def test_one_case_in_five_is_no_reason_to_stop_and_two_in_five_are():
    for lost, expected in ((1, True), (2, False)):
        ahead = RunningAhead()
        for case in range(200):
            ahead.see(1, someone_went_on=case % 5 >= lost)
        assert [ahead.lost[1] < 0.3, ahead.lost[1] > 0.3] == [expected, not expected]
