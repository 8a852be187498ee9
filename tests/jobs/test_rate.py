from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.rate import Reported, overall_rate, recent_rate

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
HOUR = 3600


def parts(*seconds, rows=10):
    return [Reported(NOON + timedelta(seconds=each), rows) for each in seconds]


@pytest.mark.parametrize(
    ("seconds", "rate"),
    [
        ((), None),
        ((0,), None),
        ((0, 5), 2.0),  # the rows of the first part were encoded before it
        ((0, 5, 10, 15), 2.0),
        ((15, 0, 10, 5), 2.0),  # in any order
        ((0, 0), None),
        ((7, 7, 7), None),
        ((0, 0, 0, 15), 2.0),  # several workers are done at the same moment
        ((0, HOUR), 10 / HOUR),  # two parts far apart may be all there is
        ((-100, 0, 5), 20 / 105),  # the clock was put back by 100 s and a bit: nothing is negative
    ],
)
def test_the_rate_is_rows_after_the_first_part_by_the_time_since(seconds, rate):
    assert recent_rate(parts(*seconds)) == (None if rate is None else pytest.approx(rate))


@pytest.mark.parametrize("pauses", [1, 2])
def test_a_pause_of_hours_is_left_out(pauses):
    steady = [5 * n for n in range(20)]
    for n in range(1, 1 + pauses):
        steady = [each if index < 5 * n else each + 8 * HOUR for index, each in enumerate(steady)]
    assert recent_rate(parts(*steady)) == pytest.approx(2.0)


def test_parts_that_take_long_each_are_no_pauses():
    assert recent_rate(parts(0, HOUR, 2 * HOUR, 3 * HOUR)) == pytest.approx(10 / HOUR)


def test_a_time_of_minutes_without_a_part_is_no_pause():
    assert recent_rate(parts(0, 1, 2, 302)) == pytest.approx(30 / 302)


def test_parts_at_one_moment_and_one_after_a_pause_have_the_rate_with_the_pause():
    assert recent_rate(parts(0, 0, 0, 0, HOUR)) == pytest.approx(40 / HOUR)


@given(st.lists(st.floats(-1e6, 1e6), max_size=32))
def test_a_rate_is_positive_or_unknown(seconds):
    rate = recent_rate(parts(*seconds))
    assert rate is None or rate > 0


@pytest.mark.parametrize(("num_done", "seconds", "rate"), [(0, 5, None), (10, 5, 2.0), (10, 0, None), (10, -5, None)])
def test_the_overall_rate_is_unknown_until_something_is_done_and_time_has_passed(num_done, seconds, rate):
    assert overall_rate(num_done, timedelta(seconds=seconds)) == rate
