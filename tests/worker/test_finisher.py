import threading

import pytest

from jobs.errors import RecordFormatError
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


def outcomes(finisher, count=1):
    found = []
    wait_for(lambda: found.extend(finisher.finished()) or len(found) >= count)
    return found


def test_a_job_is_finished_beside_what_else_goes_on(finisher, store, record):
    finisher.begin(record.id)
    assert outcomes(finisher) == [(record.id, [])]
    assert store.files(record.id).status() == JobStatus.SUCCEEDED
    assert list(finisher.finished()) == []


def test_chunks_whose_parts_are_bad_are_named(finisher, store, record):
    store.storage.write(job_names(record.id).part(1), b"rubbish")
    finisher.begin(record.id)
    assert outcomes(finisher) == [(record.id, [1])]


def test_a_job_that_is_being_finished_is_not_begun_again(finisher, store, record):
    other = make_job(store, count=1)
    do_chunk(store, other, 0)
    for _ in range(5):
        finisher.begin(record.id)
        finisher.begin(other.id)
    assert sorted(outcomes(finisher, 2)) == sorted([(record.id, []), (other.id, [])])
    assert list(finisher.finished()) == []


def test_a_job_that_cannot_be_checked_is_named_with_the_reason_and_tried_again_later(
    finisher, store, record, monkeypatch
):
    monkeypatch.setattr("worker.finisher._PAUSE_S", 0.3)
    store.storage.write(job_names(record.id).record, b"rubbish")
    finisher.begin(record.id)
    ((job_id, reason),) = outcomes(finisher)
    assert job_id == record.id
    assert isinstance(reason, RecordFormatError)
    finisher.begin(record.id)  # too soon
    assert not finisher._under_way
    wait_for(lambda: finisher.begin(record.id) or finisher._under_way)
    assert len(outcomes(finisher)) == 1


def test_one_that_is_to_stop_finishes_nothing(finisher, store, record, stopping):
    stopping.set()
    finisher.begin(record.id)
    assert outcomes(finisher) == [(record.id, [])]
    assert store.files(record.id).status() == JobStatus.RUNNING


def test_a_job_that_is_cancelled_meanwhile_is_not_finished(finisher, store, record, monkeypatch):
    monkeypatch.setattr("worker.finisher._LOOK_FOR_CANCEL_EVERY_S", 0.0)
    store.cancel(record.id)
    finisher.begin(record.id)
    assert outcomes(finisher) == [(record.id, [])]
    assert store.files(record.id).status() == JobStatus.CANCELLED


def test_a_fault_that_nobody_expects_ends_no_other_job(finisher, store, record, monkeypatch):
    other, report = make_job(store, count=1), store.report
    do_chunk(store, other, 0)

    def failing(job_id, chunk):
        if job_id == record.id:
            raise ZeroDivisionError
        return report(job_id, chunk)

    monkeypatch.setattr(store, "report", failing)
    finisher.begin(record.id)
    finisher.begin(other.id)
    found = dict(outcomes(finisher, 2))
    assert isinstance(found[record.id], ZeroDivisionError)
    assert found[other.id] == []
