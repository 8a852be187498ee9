"""The loop with a real broker and real files, and the tests in the place of workers."""

import subprocess
import threading

import pytest

from jobs import keys
from jobs.layout import job_names
from jobs.messages import JobEvent
from jobs.queue import BULK
from jobs.records import JobStatus
from jobs.store import JobStore
from layerstack.broker import broker_command
from tests.sample_jobs import INFO, announce, do_chunk, make_job, write_part
from tests.support import can_connect, wait_for
from tests.worker.queued import done, status, take, take_all, wait_for_a_search, wait_for_chunks, waiting
from worker.leases import Leases
from worker.notes import JobNotes

WINDOW = 16  # of the reconciler, with one worker of one slot
NEVER_S = 60.0  # so that nothing happens but by events


@pytest.fixture
def storage_url(tmp_path):
    """A folder: what the reconciler does is the same for each kind of storage."""
    return str(tmp_path / "storage")


# Sending.


def test_every_chunk_is_sent_once_few_at_a_time_and_the_job_finished(reconcile, redis, store, notes):
    record = make_job(store, count=40, chunk_rows=1)
    reconcile(search_every_s=NEVER_S)
    wait_for_chunks(redis, record, range(WINDOW))
    sent = []
    while len(sent) < 40:
        assert redis.llen(BULK) <= WINDOW
        job_id, chunk = take(redis)
        assert job_id == record.id
        sent.append(chunk)
        done(store, notes, record, chunk)
    assert sent == list(range(40))
    wait_for(lambda: status(store, record) == JobStatus.SUCCEEDED)
    assert store.manifest(record.id).rows == 40
    assert redis.llen(BULK) == 0


def test_jobs_share_the_queue(reconcile, redis, store):
    first, second = make_job(store, count=20, chunk_rows=1), make_job(store, count=20, chunk_rows=1)
    reconcile()
    wait_for_chunks(redis, first, range(WINDOW // 2))
    wait_for_chunks(redis, second, range(WINDOW // 2))


def test_a_job_that_cannot_run_takes_nothing_from_one_that_can(reconcile, redis, store):
    for _ in range(20):
        make_job(store, count=40, chunk_rows=1, encoder=INFO.model_copy(update={"fingerprint": "f" * 16}))
    record = make_job(store, count=40, chunk_rows=1)
    reconcile()
    wait_for_chunks(redis, record, range(WINDOW))


def test_a_new_job_is_sent_while_many_old_ones_are_still_to_be_looked_at(reconcile, redis, store, monkeypatch):
    monkeypatch.setattr("worker.reconciler._SCAN_SLICE_S", 0.0)  # one at a time
    held, look = threading.Event(), JobStore.marks
    oldest, *_, newest = (make_job(store) for _ in range(5))

    def marks(self, job_id):
        assert job_id != oldest.id or held.wait(60)
        return look(self, job_id)

    monkeypatch.setattr(JobStore, "marks", marks)
    reconcile()
    wait_for_chunks(redis, newest, range(3))
    assert waiting(redis, oldest) == []
    held.set()
    wait_for_chunks(redis, oldest, range(3))


def test_a_job_of_which_many_chunks_tell_at_once_is_looked_at_once(reconcile, redis, store, notes, monkeypatch):
    record = make_job(store)
    store.cancel(record.id)
    looked, look = [], JobStore.marks
    monkeypatch.setattr(JobStore, "marks", lambda self, job_id: looked.append(job_id) or look(self, job_id))
    redis.rpush(keys.EVENTS, *[JobEvent(job_id=record.id).model_dump_json()] * 50)
    reconcile(search_every_s=NEVER_S)
    other = make_job(store)
    notes.tell(JobEvent(job_id=other.id))
    wait_for_chunks(redis, other, range(3))
    assert looked.count(record.id) <= 2  # when it began to lead, and then for all that was told


def test_a_job_that_is_told_of_is_sent_at_once(reconcile, redis, store, notes):
    reconcile(search_every_s=NEVER_S)
    wait_for(lambda: redis.exists(keys.RECONCILER))
    record = make_job(store)
    notes.tell(JobEvent(job_id=record.id))
    wait_for_chunks(redis, record, range(3))


def test_a_job_that_nobody_tells_of_is_found(reconcile, redis, store, monkeypatch):
    monkeypatch.setattr("worker.reconciler._SCAN_EVERY_S", 0.1)
    reconcile()
    wait_for(lambda: redis.exists(keys.RECONCILER))
    wait_for_chunks(redis, make_job(store), range(3))


def test_what_is_done_already_is_not_sent(reconcile, redis, store):
    record = make_job(store)
    do_chunk(store, record, 1)
    reconcile()
    wait_for_chunks(redis, record, [0, 2])


def test_a_part_that_nobody_vouched_for_is_sent_to_a_worker(reconcile, redis, store):
    record = make_job(store)
    write_part(store, record, 1)
    reconcile()
    wait_for_chunks(redis, record, range(3))


def test_a_job_whose_encoder_nobody_has_waits_for_it_and_says_so(reconcile, redis, store):
    record = make_job(store)
    reconcile(fingerprint="f" * 16)
    wait_for(lambda: redis.exists(keys.trouble(record.id)))
    assert f"no worker has loaded the encoder {INFO.fingerprint}" in redis.get(keys.trouble(record.id)).decode()
    assert redis.llen(BULK) == 0
    announce(redis)
    wait_for_chunks(redis, record, range(3))


def test_a_job_that_cannot_be_read_stops_no_other(reconcile, redis, store):
    damaged, record = make_job(store), make_job(store)
    store.storage.write(job_names(damaged.id).record, b"rubbish")
    reconcile()
    wait_for_chunks(redis, record, range(3))


def test_an_event_that_cannot_be_read_is_dropped(reconcile, redis, store, notes):
    reconcile()
    redis.rpush(keys.EVENTS, b"rubbish")
    record = make_job(store)
    notes.tell(JobEvent(job_id=record.id))
    wait_for_chunks(redis, record, range(3))


# What gets lost.


def test_after_redis_was_emptied_all_that_was_out_is_sent_again(reconcile, redis, store):
    record = make_job(store)
    reconcile()
    wait_for_chunks(redis, record, range(3))
    redis.flushall()
    wait_for_chunks(redis, record, range(3))


def test_after_the_broker_came_back_empty_all_is_sent_again(reconcile, broker, redis, store, tmp_path_factory):
    record = make_job(store)
    reconcile()
    wait_for_chunks(redis, record, range(3))
    broker.process.kill()
    broker.process.wait()
    path = broker.url.removeprefix("unix://")
    with subprocess.Popen(broker_command(tmp_path_factory.mktemp("b"), path)) as process:
        wait_for(lambda: can_connect(path))
        wait_for_chunks(redis, record, range(3))
        process.terminate()


def test_a_message_that_got_lost_is_sent_again_without_blaming_the_chunk(reconcile, redis, store):
    record = make_job(store)
    reconcile()
    wait_for_chunks(redis, record, range(3))
    _, chunk = take(redis)
    wait_for_chunks(redis, record, range(3))
    assert store.failure(record.id, chunk) is None


def test_a_chunk_with_a_living_worker_is_not_sent_again(reconcile, broker, redis, store, notes):
    record = make_job(store)
    reconcile()
    wait_for_chunks(redis, record, range(3))
    _, chunk = take(redis)
    with broker.client() as other, Leases(other, 2.0) as leases:
        leases.acquire(keys.lease(record.id, chunk))
        notes.progress(record.id, chunk, 1)
        wait_for_a_search(redis, store, notes)
        assert chunk not in waiting(redis, record)
        assert store.failure(record.id, chunk) is None


def test_a_chunk_whose_worker_died_is_noted_as_a_crash_and_sent_again_later(reconcile, redis, store, notes):
    record = make_job(store)
    reconcile()
    wait_for_chunks(redis, record, range(3))
    _, chunk = take(redis)
    notes.progress(record.id, chunk, 1)
    wait_for(lambda: store.failure(record.id, chunk))
    failure = store.failure(record.id, chunk)
    assert (failure.attempts, failure.crashes, failure.gave_up) == (0, 1, False)
    assert chunk not in waiting(redis, record)
    wait_for_chunks(redis, record, range(3))
    assert notes.begun(record.id) == set()
    assert store.failure(record.id, chunk) == failure


def test_nobody_can_begin_a_chunk_while_the_death_of_its_worker_is_noted(reconcile, redis, store, notes, monkeypatch):
    record = make_job(store)
    held = []

    def note_failure(*args, **options):
        held.append(redis.exists(keys.lease(record.id, 1)))
        return original(*args, **options)

    original = JobStore.note_failure
    monkeypatch.setattr(JobStore, "note_failure", note_failure)
    notes.progress(record.id, 1, 1)
    reconcile()
    wait_for_chunks(redis, record, range(3))
    assert held == [1]
    assert not redis.exists(keys.lease(record.id, 1))


def test_a_worker_that_died_before_this_one_led_is_noted_too(reconcile, redis, store, notes):
    record = make_job(store)
    notes.progress(record.id, 1, 1)
    reconcile()
    wait_for(lambda: store.failure(record.id, 1))
    wait_for_chunks(redis, record, range(3))
    assert redis.llen(BULK) == 3


def test_a_chunk_that_too_many_workers_died_of_is_given_up_and_the_job_fails_once_all_others_are_done(
    reconcile, redis, store, notes
):
    record = make_job(store)
    store.note_failure(record.id, 1, "its worker died", crashed=True, limit=2)
    notes.progress(record.id, 1, 1)
    reconcile()
    wait_for_chunks(redis, record, [0, 2])
    assert status(store, record) == JobStatus.QUEUED
    for chunk in take_all(redis):
        done(store, notes, record, chunk)
    wait_for(lambda: status(store, record) == JobStatus.FAILED)
    assert store.failure(record.id, 1).crashes == 2


def test_a_chunk_that_was_done_without_a_word_counts(reconcile, redis, store):
    record = make_job(store)
    reconcile()
    wait_for_chunks(redis, record, range(3))
    do_chunk(store, record, 1)
    redis.delete(BULK)
    wait_for_chunks(redis, record, [0, 2])


# What workers tell.


def test_a_chunk_that_failed_is_sent_again_until_it_is_given_up(reconcile, redis, store, notes):
    record = make_job(store, count=8)
    reconcile(search_every_s=NEVER_S)
    wait_for_chunks(redis, record, range(2))
    assert take_all(redis) == [0, 1]
    done(store, notes, record, 0)
    for gave_up in (False, True):
        store.note_failure(record.id, 1, "x", crashed=False, limit=2)
        notes.tell(JobEvent(job_id=record.id, chunk=1, what="failed"))
        if not gave_up:
            assert take(redis) == (record.id, 1)
    wait_for(lambda: redis.llen(keys.EVENTS) == 0)
    assert status(store, record) == JobStatus.FAILED
    store.retry(record.id)
    notes.tell(JobEvent(job_id=record.id))
    assert take(redis) == (record.id, 1)


def test_while_the_storage_does_not_work_one_chunk_tries_it(reconcile, redis, store, notes):
    record = make_job(store, count=5, chunk_rows=1)
    reconcile(search_every_s=NEVER_S)
    wait_for_chunks(redis, record, range(5))
    notes.trouble(record.id, "the storage is full", 60)
    for chunk in take_all(redis):
        notes.tell(JobEvent(job_id=record.id, chunk=chunk, what="stalled"))
    _, probe = take(redis)
    assert redis.llen(BULK) == 0
    done(store, notes, record, probe)
    wait_for_chunks(redis, record, sorted({0, 1, 2, 3, 4} - {probe}))
    assert not redis.exists(keys.trouble(record.id))


# Leading.


def test_of_two_reconcilers_one_leads_and_the_other_takes_over(reconcile, redis, store):
    record = make_job(store)
    stop_first = reconcile()
    wait_for_chunks(redis, record, range(3))
    leader = redis.get(keys.RECONCILER)
    reconcile()
    second = make_job(store)
    JobNotes(redis).tell(JobEvent(job_id=second.id))
    wait_for_chunks(redis, second, range(3))
    assert redis.get(keys.RECONCILER) == leader
    assert redis.llen(BULK) == 6  # each chunk of both, once
    stop_first()
    redis.delete(BULK)
    wait_for_chunks(redis, second, range(3))
    assert redis.get(keys.RECONCILER) not in {leader, None}


def test_one_that_has_lost_its_lease_stops_leading(reconcile, redis, store, monkeypatch, caplog):
    monkeypatch.setattr("worker.reconciler._LONGEST_LEASE_S", 0.4)
    reconcile()
    wait_for(lambda: redis.exists(keys.RECONCILER))
    redis.set(keys.RECONCILER, "somebody else")
    wait_for(lambda: "another worker reconciles now" in caplog.text)
    record = make_job(store)
    JobNotes(redis).tell(JobEvent(job_id=record.id))
    assert redis.llen(keys.EVENTS) == 1  # nobody reads it
    redis.delete(keys.RECONCILER)
    wait_for_chunks(redis, record, range(3))
