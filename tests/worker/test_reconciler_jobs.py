"""What the reconciler makes of whole jobs: it finishes them, drops them, tidies up, and tells which there are."""

import json
from datetime import timedelta

import pytest
from ulid import ULID

from jobs import keys
from jobs.layout import job_names
from jobs.messages import JobEvent
from jobs.queue import BULK
from jobs.records import JobStatus
from tests.sample_jobs import INFO, do_chunk, make_job
from tests.support import wait_for
from tests.worker.queued import done, status, take, wait_for_a_search, wait_for_chunks, waiting

NEVER_S = 60.0  # so that nothing happens but by events


@pytest.fixture
def storage_url(tmp_path):
    """A folder: what the reconciler does is the same for each kind of storage."""
    return str(tmp_path / "storage")


# Finishing.


@pytest.mark.parametrize(
    "fault", [lambda storage, name: storage.write(name, b"x"), lambda storage, name: storage.delete(name)]
)
def test_a_part_that_is_bad_at_the_end_is_done_anew(reconcile, redis, store, notes, fault):
    record = make_job(store)
    for chunk in range(3):
        do_chunk(store, record, chunk)
    reconcile(search_every_s=NEVER_S)
    wait_for(lambda: status(store, record) == JobStatus.SUCCEEDED)
    fault(store.storage, job_names(record.id).part(1))
    store.retry(record.id)
    notes.tell(JobEvent(job_id=record.id))
    wait_for_chunks(redis, record, [1])
    take(redis)
    done(store, notes, record, 1)
    wait_for(lambda: status(store, record) == JobStatus.SUCCEEDED)


def test_a_cancelled_job_is_sent_no_more_until_it_is_retried(reconcile, redis, store, notes):
    record = make_job(store)
    reconcile()
    wait_for_chunks(redis, record, range(3))
    store.cancel(record.id)
    notes.progress(record.id, 2, 1)  # of a worker that died with it
    notes.tell(JobEvent(job_id=record.id))
    wait_for(lambda: notes.begun(record.id) == set())
    redis.delete(BULK)
    wait_for_a_search(redis, store, notes)
    assert waiting(redis, record) == []
    store.retry(record.id)
    notes.tell(JobEvent(job_id=record.id))
    wait_for_chunks(redis, record, range(3))


def test_a_deleted_job_is_sent_no_more(reconcile, redis, store, notes):
    record = make_job(store)
    reconcile()
    wait_for_chunks(redis, record, range(3))
    store.delete(record.id)
    notes.tell(JobEvent(job_id=record.id))
    wait_for_a_search(redis, store, notes)
    redis.delete(BULK)
    wait_for_a_search(redis, store, notes)
    assert waiting(redis, record) == []


# Tidying up.


def test_results_are_deleted_once_their_time_is_up(reconcile, store):
    record = make_job(store)
    for chunk in range(3):
        do_chunk(store, record, chunk)
    reconcile(retention=timedelta(seconds=0.01))
    wait_for(lambda: status(store, record) == JobStatus.EXPIRED)
    assert not store.has_part(record.id, 0)


def test_uploads_that_were_cut_off_are_removed(reconcile, store, monkeypatch):
    monkeypatch.setattr("worker.reconciler._SCAN_EVERY_S", 0.1)
    names = job_names(str(ULID()))
    store.storage.write(names.prompts(0), b"x")
    reconcile(abandoned_after=timedelta(seconds=0.1))
    wait_for(lambda: store.storage.folders("jobs") == [])


def test_temporary_files_of_markers_whose_writers_died_are_removed(reconcile, store):
    unfinished = store.storage.local_path("idempotency/.abc.json.x.tmp")
    unfinished.parent.mkdir(parents=True)
    unfinished.touch()
    reconcile()
    wait_for(lambda: not unfinished.exists())


# Jobs that end with the first failure.


def test_a_job_that_ends_with_the_first_failure_is_sent_no_more_until_it_is_retried(reconcile, redis, store, notes):
    record = make_job(store, count=40, chunk_rows=1, on_error="fail")
    reconcile(search_every_s=NEVER_S)
    wait_for_chunks(redis, record, range(16))
    assert take(redis) == (record.id, 0)
    store.note_failure(record.id, 0, "prompt 0 failed", crashed=False, limit=1)
    notes.tell(JobEvent(job_id=record.id, chunk=0, what="failed"))
    wait_for(lambda: redis.exists(keys.cancelled(record.id)))
    assert status(store, record) == JobStatus.FAILED
    other = make_job(store)
    notes.tell(JobEvent(job_id=other.id))
    wait_for_chunks(redis, other, range(3))
    assert waiting(redis, record) == list(range(1, 16))  # what had been sent, and no more
    redis.delete(BULK)
    store.retry(record.id)
    notes.tell(JobEvent(job_id=record.id))
    wait_for_chunks(redis, record, range(13))  # the other job has its share


def test_a_job_that_ended_with_the_first_failure_is_not_begun_by_one_that_leads_anew(reconcile, redis, store, notes):
    record = make_job(store, on_error="fail")
    store.note_failure(record.id, 1, "prompt 5 failed", crashed=False, limit=1)
    reconcile()
    wait_for_a_search(redis, store, notes)
    assert waiting(redis, record) == []


# What is told of all jobs.


def told(redis):
    counts = redis.hgetall(keys.JOB_COUNTS)
    return {name.decode(): int(number) for name, number in counts.items() if int(number)}


def queue(redis):
    return json.loads(redis.get(keys.QUEUE) or b"null")


def test_unfinished_jobs_are_told_oldest_first_and_all_are_counted(reconcile, redis, store):
    new, begun, foreign, ended, cancelled, failed = (
        make_job(store, encoder=INFO.model_copy(update={"fingerprint": name}))
        for name in (INFO.fingerprint, INFO.fingerprint, "f" * 16, *[INFO.fingerprint] * 3)
    )
    do_chunk(store, begun, 0)
    for chunk in range(3):
        do_chunk(store, ended, chunk)
        store.note_failure(failed.id, chunk, "x", crashed=False, limit=1)
    store.cancel(cancelled.id)
    reconcile()
    unfinished = [new.id, begun.id, foreign.id]
    counts = {"queued": 1, "running": 1, "paused": 1, "succeeded": 1, "cancelled": 1, "failed": 1}
    wait_for(lambda: (queue(redis), told(redis)) == (unfinished, counts))
    assert set(redis.hgetall(keys.JOB_COUNTS)) == {each.value.encode() for each in JobStatus}
    assert 0 < redis.ttl(keys.QUEUE) <= 31
    assert 0 < redis.ttl(keys.JOB_COUNTS) <= 31


def test_a_new_job_is_in_the_queue_at_once(reconcile, redis, store, notes):
    reconcile(search_every_s=NEVER_S)
    wait_for(lambda: queue(redis) == [])
    record = make_job(store)
    notes.tell(JobEvent(job_id=record.id))
    wait_for(lambda: queue(redis) == [record.id])


def test_nothing_is_told_before_all_jobs_have_been_looked_at(reconcile, redis, store, monkeypatch):
    monkeypatch.setattr("worker.reconciler._SCAN_SLICE_S", 0.0)  # one at a time
    oldest, *_, newest = (make_job(store) for _ in range(3))
    looks = []
    look = type(store).marks

    def marks(self, job_id):
        looks.append((job_id, redis.exists(keys.QUEUE)))
        return look(self, job_id)

    monkeypatch.setattr(type(store), "marks", marks)
    reconcile()
    wait_for(lambda: redis.exists(keys.QUEUE))
    first_looks = looks[: [job_id for job_id, _ in looks].index(oldest.id) + 1]
    assert first_looks[0] == (newest.id, 0)
    assert [was_told for _, was_told in first_looks] == [0] * len(first_looks)


def test_of_a_long_queue_the_first_are_told(redis, notes):
    notes.overview([str(n) for n in range(5000)], {}, 9.0)
    assert queue(redis) == [str(n) for n in range(keys.MAX_QUEUE)]
