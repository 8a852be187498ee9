import threading

import pytest

from jobs.errors import RecordFormatError, StorageError
from jobs.layout import job_names
from jobs.records import JobStatus
from tests.sample_jobs import do_chunk, make_job
from tests.support import wait_for
from worker.finisher import Finisher


@pytest.fixture
def record(store):
    """A job whose parts all count."""
    made = make_job(store)
    for chunk in range(3):
        do_chunk(store, made, chunk)
    return made


@pytest.fixture
def stopping():
    return threading.Event()


@pytest.fixture
def finisher(store, stopping):
    with Finisher(store, read_all=True, should_stop=stopping.is_set) as running:
        yield running


def _raise(error):
    raise error


def outcomes(finisher, count=1):
    found = []
    wait_for(lambda: found.extend(finisher.finished()) or len(found) >= count)
    return found


def test_a_job_is_finished_beside_what_else_goes_on(finisher, store, record):
    finisher.finish([record.id])
    assert outcomes(finisher) == [(record.id, [])]
    assert store.files(record.id).status() == JobStatus.SUCCEEDED
    assert list(finisher.finished()) == []


def test_chunks_whose_parts_are_bad_are_named(finisher, store, record):
    store.storage.write(job_names(record.id).part(1), b"rubbish")
    finisher.finish([record.id])
    assert outcomes(finisher) == [(record.id, [1])]


def test_a_job_that_is_being_finished_is_not_begun_again(finisher, store, record):
    other = make_job(store, count=1)
    do_chunk(store, other, 0)
    for _ in range(5):
        finisher.finish([record.id, other.id])
    assert sorted(outcomes(finisher, 2)) == sorted([(record.id, []), (other.id, [])])
    assert list(finisher.finished()) == []


def test_a_job_that_cannot_be_checked_is_named_with_the_reason_and_tried_again_later(
    finisher, store, record, monkeypatch
):
    monkeypatch.setattr("worker.finisher._PAUSE_S", 0.3)
    store.storage.write(job_names(record.id).record, b"rubbish")
    finisher.finish([record.id])
    ((job_id, reason),) = outcomes(finisher)
    assert job_id == record.id
    assert isinstance(reason, RecordFormatError)
    finisher.finish([record.id])  # too soon
    assert finisher._jobs[record.id].future is None
    wait_for(lambda: finisher.finish([record.id]) or finisher._jobs[record.id].future)
    assert len(outcomes(finisher)) == 1


def test_one_that_is_to_stop_finishes_nothing(finisher, store, record, stopping):
    stopping.set()
    finisher.finish([record.id])
    assert outcomes(finisher) == [(record.id, [])]
    assert store.files(record.id).status() == JobStatus.RUNNING


def test_a_job_that_is_cancelled_meanwhile_is_not_finished(finisher, store, record, monkeypatch):
    monkeypatch.setattr("worker.finisher._LOOK_FOR_CANCEL_EVERY_S", 0.0)
    store.cancel(record.id)
    finisher.finish([record.id])
    assert outcomes(finisher) == [(record.id, [])]
    assert store.files(record.id).status() == JobStatus.CANCELLED


def test_a_job_whose_part_was_done_anew_while_the_storage_failed_is_read_again(finisher, store, record, monkeypatch):
    monkeypatch.setattr("worker.finisher._PAUSE_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_manifest", lambda *_: _raise(StorageError("the disk failed")))
        finisher.finish([record.id])
        ((_, reason),) = outcomes(finisher)
    assert isinstance(reason, StorageError)
    store.discard_part(record.id, 0)
    finisher.finish([])  # it is not complete
    report = do_chunk(store, record, 0, bad={1})  # other bytes than before
    finisher.finish([record.id])
    assert outcomes(finisher) == [(record.id, [])]
    assert store.manifest(record.id).parts[0] == report.part


def test_a_job_that_is_not_complete_any_more_is_not_finished(finisher, store, record, monkeypatch):
    reading, go_on, report = threading.Event(), threading.Event(), store.report

    def held(job_id, chunk):
        reading.set()
        assert go_on.wait(60)
        return report(job_id, chunk)

    monkeypatch.setattr(store, "report", held)
    finisher.finish([record.id])
    assert reading.wait(60)
    finisher.finish([])
    go_on.set()
    assert outcomes(finisher) == [(record.id, [])]
    assert store.files(record.id).status() == JobStatus.RUNNING


def test_a_fault_that_nobody_expects_ends_no_other_job(finisher, store, record, monkeypatch):
    other, report = make_job(store, count=1), store.report
    do_chunk(store, other, 0)

    def failing(job_id, chunk):
        if job_id == record.id:
            raise ZeroDivisionError
        return report(job_id, chunk)

    monkeypatch.setattr(store, "report", failing)
    finisher.finish([record.id, other.id])
    found = dict(outcomes(finisher, 2))
    assert isinstance(found[record.id], ZeroDivisionError)
    assert found[other.id] == []
