"""Chunks of jobs and workers that are to stop."""

import pytest
from celery.exceptions import Reject

from jobs import keys
from jobs.layout import job_names
from jobs.records import JobStatus
from tests.worker.running import at_rest, begin, events, run


def test_a_cancelled_job_is_put_down_before_it_is_begun(tasks, redis, store, forwards, make_job):
    record = make_job()
    store.cancel(record.id)
    redis.set(keys.cancelled(record.id), 1)
    run(tasks, record)
    assert (forwards.texts, events(redis)) == ([], [(None, "changed")])
    assert at_rest(redis, record)


@pytest.mark.parametrize("ask", ["cancel", "delete"])
def test_a_job_that_is_cancelled_or_deleted_is_put_down_in_the_middle(
    tasks, redis, store, engine, forwards, make_job, monkeypatch, ask
):
    monkeypatch.setattr("worker.tasks._LOOK_AT_FILES_EVERY_S", 0.2)
    record = make_job()
    with forwards.held(engine):
        running = begin(tasks, redis, record)
        getattr(store, ask)(record.id)
        running.join()
    assert running.error is None
    assert at_rest(redis, record)
    assert events(redis) == [(None, "changed")]
    assert store.storage.files(job_names(record.id).parts_folder) == []


def test_a_job_that_goes_on_is_not_stopped_by_what_redis_still_says(tasks, redis, store, make_job):
    record = make_job()
    redis.set(keys.cancelled(record.id), 1)  # cancelled once, and retried
    run(tasks, record)
    assert store.has_part(record.id, 0)


def test_a_stopping_worker_gives_the_message_back(tasks, redis, stopping, make_job):
    record = make_job()
    stopping.set()
    with pytest.raises(Reject) as rejected:
        run(tasks, record)
    assert rejected.value.requeue
    assert at_rest(redis, record)
    assert events(redis) == []


def test_a_worker_that_stops_in_the_middle_gives_the_message_back_and_leaves_nothing(
    tasks, redis, store, stopping, engine, forwards, make_job
):
    record = make_job()
    with forwards.held(engine):
        running = begin(tasks, redis, record)
        stopping.set()
        running.join()
    assert running.error.requeue
    assert at_rest(redis, record)
    assert store.storage.files(job_names(record.id).parts_folder) == []


def test_a_prompt_that_fails_ends_a_job_that_is_to_fail_then_at_the_first_attempt(
    tasks, redis, store, forwards, make_job
):
    forwards.fault = lambda texts: RuntimeError("no way") if "bad" in texts else None
    record = make_job(texts=["a", "b", "bad", "c"], chunk_rows=2, on_error="fail")
    run(tasks, record, 1)
    failure = store.failure(record.id, 1)
    assert (failure.attempts, failure.crashes, failure.gave_up) == (1, 0, True)
    assert failure.error == "prompt 2 (id '2') failed: RuntimeError: no way"
    assert store.files(record.id).view().error == f"chunk 1, after 1 attempt: {failure.error}"
    assert store.files(record.id).status() == JobStatus.FAILED
    assert events(redis) == [(1, "failed")]
    assert at_rest(redis, record, 1)
    forwards.fault = lambda _texts: None
    store.retry(record.id)
    run(tasks, record, 1)
    assert store.has_part(record.id, 1)


@pytest.mark.parametrize("is_told", [True, False])
def test_a_chunk_of_a_job_that_fails_meanwhile_is_put_down(
    tasks, redis, store, engine, forwards, make_job, monkeypatch, is_told
):
    monkeypatch.setattr("worker.tasks._LOOK_AT_FILES_EVERY_S", 9999.0 if is_told else 0.2)
    monkeypatch.setattr("worker.tasks._PROGRESS_EVERY_S", -1.0)
    record = make_job(on_error="fail")
    with forwards.held(engine):
        running = begin(tasks, redis, record, 0)
        store.note_failure(record.id, 1, "prompt 5 failed", crashed=False, limit=1)
        if is_told:
            tasks.notes.stopped(record.id)
        else:
            running.join()
    running.join()
    assert at_rest(redis, record)
    assert events(redis) == [(None, "changed")]
    assert store.storage.files(job_names(record.id).parts_folder) == []


def test_a_chunk_of_a_job_that_has_failed_is_not_begun(tasks, redis, store, forwards, make_job):
    record = make_job(on_error="fail")
    store.note_failure(record.id, 1, "prompt 5 failed", crashed=False, limit=1)
    tasks.notes.stopped(record.id)
    run(tasks, record, 0)
    assert (forwards.texts, events(redis)) == ([], [(None, "changed")])


def test_a_failure_of_a_job_that_goes_on_stops_no_other_chunk(tasks, redis, store, make_job):
    record = make_job()
    store.note_failure(record.id, 1, "x", crashed=False, limit=1)
    tasks.notes.stopped(record.id)
    run(tasks, record, 0)
    assert store.has_part(record.id, 0)
    assert at_rest(redis, record)
