import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from worker.schedule import Schedule, pause_s, shares

WINDOW = 3


def test_chunks_go_in_order_and_few_at_a_time():
    schedule = Schedule(5)
    assert schedule.due(0, WINDOW) == [0, 1, 2]
    assert schedule.due(0, WINDOW) == []
    schedule.done(1)
    assert schedule.due(0, WINDOW) == [3]


def test_a_job_is_complete_once_all_are_done_and_settled_once_none_is_left():
    schedule = Schedule(3)
    schedule.due(0, WINDOW)
    schedule.done(0)
    schedule.done(1)
    assert not schedule.complete
    assert not schedule.settled
    schedule.give_up(2)
    assert schedule.settled
    assert not schedule.complete
    schedule.done(2)
    assert schedule.complete


def test_what_the_files_say_is_done_or_given_up_is_never_sent():
    schedule = Schedule(6)
    schedule.learn(done=[0, 3], given_up=[1, 3])
    assert schedule.due(0, WINDOW) == [2, 4, 5]


def test_what_had_been_given_up_is_sent_after_a_retry():
    schedule = Schedule(4)
    assert schedule.due(0, 4) == [0, 1, 2, 3]
    schedule.done(0)
    schedule.give_up(1)
    schedule.give_up(3)
    schedule.learn(done=[0], given_up=[])
    assert schedule.due(0, 4) == [1, 3]


def test_a_part_that_has_gone_is_made_anew():
    schedule = Schedule(2)
    schedule.due(0, WINDOW)
    schedule.done(0)
    schedule.done(1)
    schedule.learn(done=[1], given_up=[])
    assert schedule.due(0, WINDOW) == [0]
    schedule.put_back(1)
    assert schedule.due(0, WINDOW) == [1]


def test_a_chunk_that_failed_waits_for_its_time_while_others_go_on():
    schedule = Schedule(4)
    schedule.due(0, 2)
    schedule.put_back(0, not_before=10)
    assert schedule.due(5, 2) == [2]
    schedule.done(2)
    assert schedule.due(10, 2) == [0]


def test_a_storage_that_does_not_work_is_tried_with_one_chunk_at_growing_distances():
    schedule = Schedule(9)
    now, waits = 100.0, []
    (chunk, *others) = schedule.due(now, WINDOW)
    for other in others:
        schedule.done(other)
    for _ in range(9):
        waits.append(schedule.stall(chunk, now))
        assert schedule.due(now + waits[-1] - 0.01, WINDOW) == []
        now += waits[-1]
        (chunk,) = schedule.due(now, WINDOW)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    schedule.done(chunk)
    assert len(schedule.due(now, WINDOW)) == WINDOW
    assert schedule.stall(1, now) == 1


def test_chunks_that_were_under_way_when_the_storage_failed_make_the_pause_no_longer():
    schedule = Schedule(9)
    schedule.due(100, WINDOW)
    assert [schedule.stall(chunk, 100 + chunk / 10) for chunk in range(3)] == [1, None, None]
    assert schedule.due(100.9, WINDOW) == []
    assert len(schedule.due(101, WINDOW)) == 1


def test_a_chunk_that_is_put_back_before_its_turn_is_sent_once():
    schedule = Schedule(4)  # of one that leads anew, and hears of a chunk that its predecessor sent
    schedule.put_back(1)
    assert sorted(schedule.due(0, 4)) == [0, 1, 2, 3]


def test_a_job_that_ends_with_the_first_failure_sends_nothing_after_it_until_it_is_retried():
    schedule = Schedule(5, stops_at_failure=True)
    schedule.due(0, WINDOW)
    schedule.put_back(1)
    assert not schedule.settled
    schedule.give_up(1)
    assert (schedule.settled, schedule.complete, schedule.demand) == (True, False, 0)
    assert schedule.due(0, WINDOW) == []
    schedule.done(0)
    assert schedule.due(0, WINDOW) == []
    schedule.learn(done=[0], given_up=[])
    assert not schedule.settled
    assert schedule.due(0, WINDOW) == [1, 3]  # 2 is under way still


@pytest.mark.parametrize(("failures", "seconds"), [(0, 1), (1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (2000, 60)])
def test_the_more_attempts_failed_the_longer_is_the_pause(failures, seconds):
    assert pause_s(failures) == seconds


@pytest.mark.parametrize(
    ("demands", "total", "windows"),
    [
        ([], 16, []),
        ([100], 16, [16]),
        ([100, 100], 16, [8, 8]),
        ([100, 1, 100], 16, [7, 5, 8]),
        ([0, 100], 16, [8, 16]),
        ([3, 3, 3], 4, [2, 2, 2]),
        ([9] * 40, 16, [2] * 40),
    ],
)
def test_what_one_job_does_not_need_goes_to_the_others(demands, total, windows):
    assert shares(demands, total, least=2) == windows


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(1, 64))
def test_nothing_is_left_over_that_somebody_needs(demands, total):
    windows = shares(demands, total, least=1)
    used = sum(min(window, demand) for window, demand in zip(windows, demands, strict=True))
    assert used >= min(total, sum(demands))


class ScheduleMachine(RuleBasedStateMachine):
    """Whatever workers and files say, in any order, late and twice."""

    @initialize(num_chunks=st.integers(1, 8))
    def begin(self, num_chunks):
        self.schedule = Schedule(num_chunks)
        self.num_chunks, self.now = num_chunks, 0.0
        self.done, self.given_up, self.outstanding, self.not_before = set(), set(), set(), {}
        self.stalled = False

    def chunk(self, number):
        return number % self.num_chunks

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0]))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def send(self):
        window = 1 if self.stalled else WINDOW
        before = len(self.outstanding)
        chosen = self.schedule.due(self.now, WINDOW)
        assert len(set(chosen)) == len(chosen) <= max(0, window - before)
        for chunk in chosen:
            assert 0 <= chunk < self.num_chunks
            assert chunk not in self.done | self.given_up | self.outstanding
            assert self.not_before.get(chunk, 0.0) <= self.now
        self.outstanding |= set(chosen)

    @rule(number=st.integers(0, 7))
    def is_done(self, number):
        chunk = self.chunk(number)
        self.stalled = self.stalled and chunk not in self.outstanding
        self.schedule.done(chunk)
        self.done.add(chunk)
        self.given_up.discard(chunk)
        self.outstanding.discard(chunk)
        self.not_before.pop(chunk, None)

    @rule(number=st.integers(0, 7), pause=st.sampled_from([0.0, 1.0, 30.0]))
    def has_failed(self, number, pause):
        chunk = self.chunk(number)
        self.schedule.put_back(chunk, self.now + pause)
        self.done.discard(chunk)
        self.outstanding.discard(chunk)
        self.not_before[chunk] = self.now + pause

    @rule(number=st.integers(0, 7))
    def is_given_up(self, number):
        chunk = self.chunk(number)
        self.schedule.give_up(chunk)
        self.outstanding.discard(chunk)
        if chunk not in self.done:
            self.given_up.add(chunk)

    @precondition(lambda self: self.outstanding)
    @rule(number=st.integers(0, 7))
    def stalls(self, number):
        chunk = sorted(self.outstanding)[number % len(self.outstanding)]
        pause = self.schedule.stall(chunk, self.now)
        assert pause is None or 1 <= pause <= 60
        self.outstanding.discard(chunk)
        self.not_before[chunk] = 0.0
        self.stalled = True

    @rule(gone=st.sets(st.integers(0, 7)), found=st.sets(st.integers(0, 7)), forgiven=st.booleans())
    def files_are_read(self, gone, found, forgiven):
        self.done = {chunk for chunk in self.done | found if chunk < self.num_chunks} - gone
        self.given_up = set() if forgiven else self.given_up - self.done
        if self.done & self.outstanding:
            self.stalled = False
        self.schedule.learn(self.done, self.given_up)
        self.outstanding -= self.done
        for chunk in self.done:
            self.not_before.pop(chunk, None)

    @invariant()
    def agree(self):
        if not hasattr(self, "schedule"):
            return
        assert set(self.schedule.outstanding) == self.outstanding
        assert len(self.outstanding) <= WINDOW
        assert self.schedule.complete == (len(self.done) == self.num_chunks)
        assert self.schedule.settled == (len(self.done | self.given_up) == self.num_chunks)

    def teardown(self):
        """Every chunk that is not given up is sent in the end, if workers do what they get."""
        if not hasattr(self, "schedule"):
            return
        for chunk in sorted(self.outstanding):
            self.is_done(chunk)
        for _ in range(2 * self.num_chunks):
            self.wait(100.0)
            self.send()
            for chunk in sorted(self.outstanding):
                self.is_done(chunk)
        assert self.schedule.settled


TestSchedule = ScheduleMachine.TestCase
TestSchedule.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
