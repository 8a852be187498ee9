import threading

import pytest

from worker.turns import Turns

S = 30  # after which a turn that has not come is a failure


class Chunk:
    """A thread that asks for a turn, and has it until it is told to end."""

    def __init__(self, turns, *, alone=False, waiting=lambda: None, fault=None):
        self.begun, self.waits, self._end = threading.Event(), threading.Event(), threading.Event()
        self.refused = False
        self._fault = fault
        self._thread = threading.Thread(target=self._run, args=(turns, alone, waiting))
        self._thread.start()

    def _run(self, turns, alone, waiting):
        def asked():
            self.waits.set()
            waiting()

        try:
            with turns.take(alone=alone, waiting=asked):
                self.begun.set()
                assert self._end.wait(S)
                if self._fault:
                    raise self._fault
        except InterruptedError:
            self.refused = True

    def end(self):
        self._end.set()
        self._thread.join(S)
        assert not self._thread.is_alive()


@pytest.fixture
def turns():
    return Turns()


@pytest.fixture
def begin(turns):
    """Start a chunk; all of them end with the test."""
    started = []

    def start(**options):
        chunk = Chunk(turns, **options)
        started.append(chunk)
        return chunk

    yield start
    for chunk in started:
        chunk.end()


def test_chunks_run_side_by_side(begin):
    assert all(chunk.begun.wait(S) for chunk in [begin(), begin(), begin()])


def test_one_that_has_to_be_alone_waits_for_the_others_and_they_for_it(begin):
    first = begin()
    assert first.begun.wait(S)
    alone = begin(alone=True)
    assert alone.waits.wait(S)
    assert not alone.begun.is_set()
    first.end()
    assert alone.begun.wait(S)
    later = begin()
    assert later.waits.wait(S)
    assert not later.begun.is_set()
    alone.end()
    assert later.begun.wait(S)


def test_two_that_have_to_be_alone_go_one_after_the_other(begin):
    first, second = begin(alone=True), begin(alone=True)
    while not (first.begun.is_set() or second.begun.is_set()):
        first.begun.wait(0.01)
    running, waiting = (first, second) if first.begun.is_set() else (second, first)
    assert waiting.waits.wait(S)
    assert not waiting.begun.is_set()
    running.end()
    assert waiting.begun.wait(S)


def test_nobody_new_begins_while_one_waits_to_be_alone(begin):
    first = begin()
    assert first.begun.wait(S)
    alone = begin(alone=True)
    assert alone.waits.wait(S)
    later = begin()
    assert later.waits.wait(S)
    assert not later.begun.is_set()
    first.end()
    assert alone.begun.wait(S)


def test_one_that_gives_up_waiting_is_in_nobodys_way(begin):
    def interrupted():
        raise InterruptedError

    first = begin()
    assert first.begun.wait(S)
    impatient = begin(alone=True, waiting=interrupted)
    impatient.end()
    assert impatient.refused
    assert begin().begun.wait(S)


@pytest.mark.parametrize("alone", [False, True])
def test_a_turn_ends_with_a_fault_too(begin, alone):
    failing = begin(alone=alone, fault=InterruptedError())
    assert failing.begun.wait(S)
    failing.end()
    assert begin(alone=True).begun.wait(S)
