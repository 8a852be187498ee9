import pytest
from redis import RedisError

from jobs import keys
from jobs.messages import JobEvent
from worker.notes import JobNotes, Progress

JOB = "01M8259KQ6ZM43ZW7F9E4YQJWV"
OTHER = "01M8259KQ6ZM43ZW7F9E4YQJWW"


@pytest.fixture
def notes(redis):
    return JobNotes(redis)


def test_chunks_are_under_way_from_their_first_progress_until_they_are_put_down(notes, redis):
    assert notes.begun(JOB) == set()
    notes.progress(JOB, 0, 0)
    notes.progress(JOB, 3, 7)
    notes.progress(OTHER, 5, 1)
    assert notes.begun(JOB) == {0, 3}
    assert redis.hgetall(keys.progress(JOB)) == {b"0": b"0", b"3": b"7"}
    notes.put_down(JOB, 0)
    assert notes.begun(JOB) == {3}


def test_progress_is_answered_with_what_became_of_lease_and_job(notes, redis):
    assert notes.progress(JOB, 0, 1) == Progress(is_leased=False, is_stopped=False)
    redis.set(keys.lease(JOB, 0), "x")
    assert notes.progress(JOB, 0, 2) == Progress(is_leased=True, is_stopped=False)
    assert notes.progress(JOB, 1, 2) == Progress(is_leased=False, is_stopped=False)
    redis.set(keys.cancelled(JOB), 1)
    assert notes.progress(JOB, 0, 3) == Progress(is_leased=True, is_stopped=True)


def test_events_are_told_in_order(notes, redis):
    events = [JobEvent(job_id=JOB), JobEvent(job_id=JOB, chunk=2, what="done")]
    for event in events:
        notes.tell(event)
    assert [JobEvent.model_validate_json(content) for content in redis.lrange(keys.EVENTS, 0, -1)] == events


def test_of_very_many_events_the_oldest_are_dropped(notes, redis, monkeypatch):
    monkeypatch.setattr(keys, "MAX_EVENTS", 3)
    for chunk in range(5):
        notes.tell(JobEvent(job_id=JOB, chunk=chunk))
    kept = [JobEvent.model_validate_json(content).chunk for content in redis.lrange(keys.EVENTS, 0, -1)]
    assert kept == [2, 3, 4]


def test_a_trouble_is_told_for_its_time_or_until_it_is_over(notes, redis):
    notes.trouble(JOB, "the storage is full", 40)
    assert redis.get(keys.trouble(JOB)) == b"the storage is full"
    assert 30 < redis.ttl(keys.trouble(JOB)) <= 40
    notes.no_trouble(JOB)
    assert not redis.exists(keys.trouble(JOB))
    notes.trouble(JOB, "for a moment", 0.01)
    assert redis.ttl(keys.trouble(JOB)) == 1


def test_nothing_that_is_told_stays_for_ever(notes, redis):
    notes.progress(JOB, 0, 0)
    notes.tell(JobEvent(job_id=JOB))
    notes.trouble(JOB, "x", 1)
    assert all(redis.ttl(key) > 0 for key in redis.keys("*"))


def test_without_redis_nothing_is_told_and_nobody_fails(notes, broker):
    broker.process.terminate()
    broker.process.wait()
    assert notes.progress(JOB, 0, 1) == Progress(is_leased=True, is_stopped=False)
    notes.put_down(JOB, 0)
    notes.tell(JobEvent(job_id=JOB))
    notes.trouble(JOB, "x", 1)
    notes.no_trouble(JOB)
    with pytest.raises(RedisError):
        notes.begun(JOB)
