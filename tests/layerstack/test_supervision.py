import pytest

from layerstack.supervision import FIRST_WAIT_S, LONG_LIFE_S, Restarts, describe_end


def waits_of(restarts, lives):
    """The waits after lives of these lengths, each begun when it was due."""
    now = 0.0
    waits = []
    for life in lives:
        restarts.started(now)
        now += life
        waits.append(restarts.died(-9, now, was_ready=True))
        now += waits[-1]
    return waits


def test_a_child_is_due_before_its_first_start():
    assert Restarts().is_due(0.0)


def test_the_wait_doubles_with_each_short_life_up_to_half_a_minute():
    assert waits_of(Restarts(), [2] * 7) == [1, 2, 4, 8, 16, 30, 30]


def test_after_a_long_life_the_wait_is_the_first_again():
    assert waits_of(Restarts(), [2, 2, LONG_LIFE_S, 2, LONG_LIFE_S - 1]) == [1, 2, 1, 2, 4]


def test_a_start_that_fails_counts_as_the_shortest_life():
    restarts = Restarts()
    restarts.started(0.0)
    assert restarts.died(-9, 10 * LONG_LIFE_S, was_ready=True) == FIRST_WAIT_S
    restarts.started(11 * LONG_LIFE_S)
    assert restarts.died(1, 11 * LONG_LIFE_S, was_ready=True) == 2 * FIRST_WAIT_S


def test_a_child_is_due_once_its_wait_is_over():
    restarts = Restarts()
    restarts.started(100.0)
    wait_s = restarts.died(-9, 103.0, was_ready=True)
    assert not restarts.is_due(103.0)
    assert not restarts.is_due(103.0 + wait_s - 0.01)
    assert restarts.is_due(103.0 + wait_s)


def test_exit_code_1_before_the_stack_was_ready_is_final():
    restarts = Restarts()
    restarts.started(0.0)
    assert restarts.died(1, 1.0, was_ready=False) is None


@pytest.mark.parametrize("exit_code", [0, 2, 3, -9, -15, -11])
def test_any_other_end_before_the_stack_was_ready_is_not(exit_code):
    restarts = Restarts()
    restarts.started(0.0)
    assert restarts.died(exit_code, 1.0, was_ready=False) == FIRST_WAIT_S


@pytest.mark.parametrize("exit_code", [0, 1, 2, -9])
def test_no_end_is_final_once_the_stack_was_ready(exit_code):
    restarts = Restarts()
    restarts.started(0.0)
    assert restarts.died(exit_code, 1.0, was_ready=True) == FIRST_WAIT_S


@pytest.mark.parametrize(
    ("exit_code", "words"),
    [
        (0, "ended with exit code 0"),
        (3, "ended with exit code 3"),
        (-9, "was killed by SIGKILL"),
        (-11, "was killed by SIGSEGV"),
        (-40, "was killed by signal 40"),
    ],
)
def test_an_end_is_told_in_words(exit_code, words):
    assert describe_end(exit_code) == words
