import pytest

from art.pacing import AT_FIRST, FEWEST, MOST, ROUND_S, WakingPace


def round_of(pace, start_s, each_s):
    """Wake as many as the pace says, each of which takes `each_s`; gives when the round is over."""
    count = pace.at_once()
    for index in range(count):
        pace.woke(start_s + index * each_s)
    return count, start_s + count * each_s


@pytest.mark.parametrize("each_s", [0.00001, 0.0001, 0.0003, 0.01])
def test_a_round_takes_about_as_long_as_it_may(each_s):
    pace, now_s, count = WakingPace(), 0.0, 0
    for _ in range(20):
        count, now_s = round_of(pace, now_s + 1, each_s)
    assert count == min(max(int(ROUND_S / each_s + 1e-6), FEWEST), MOST)


def test_one_slow_round_halves_the_next_and_no_more():
    pace = WakingPace()
    assert round_of(pace, 0.0, ROUND_S / AT_FIRST)[0] == AT_FIRST
    assert round_of(pace, 1.0, 5.0)[0] == AT_FIRST
    assert pace.at_once() == AT_FIRST // 2


def test_time_between_rounds_does_not_count():
    pace = WakingPace()
    for start_s in range(10):
        count, _ = round_of(pace, start_s * 100, ROUND_S / 16.5)
    assert count == 16


def test_a_single_task_says_nothing_of_what_it_took():
    pace = WakingPace()
    assert pace.at_once() == AT_FIRST
    pace.woke(0.0)
    assert pace.at_once() == AT_FIRST
