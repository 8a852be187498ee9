"""Whose a job is, and what a listing of somebody's jobs costs."""

import pytest

from jobs.errors import JobNotFoundError
from jobs.layout import job_names
from jobs.storage import open_storage
from jobs.store import JobStore
from tests.sample_jobs import make_job

UNKNOWN = "01M8259KQ6ZM43ZW7F9E4YQJWV"


def not_found(store, job_id, owner):
    with pytest.raises(JobNotFoundError) as caught:
        store.check_owner(job_id, owner)
    return str(caught.value)


def test_a_job_is_found_by_its_owner_and_without_keys_only(store):
    record = make_job(store, owner="ann")
    store.check_owner(record.id, "ann")
    store.check_owner(record.id, None)
    for _ in range(2):
        assert not_found(store, record.id, "bob") == f"no job {record.id!r}"


@pytest.mark.parametrize("job_id", [UNKNOWN, "", "../x"])
def test_somebody_elses_job_looks_like_one_that_does_not_exist(store, job_id):
    foreign = make_job(store, owner="ann").id
    assert not_found(store, foreign, "bob") == f"no job {foreign!r}"
    assert not_found(store, job_id, "bob") == f"no job {job_id!r}"


def test_a_job_that_was_made_without_keys_is_nobodys(store):
    not_found(store, make_job(store).id, "ann")


def test_a_job_whose_record_is_damaged_is_nobodys(store, caplog):
    record = make_job(store, owner="ann")
    store.storage.write(job_names(record.id).record, b"rubbish")
    not_found(store, record.id, "ann")
    assert "the owner of a job is not known" in caplog.text
    assert list(store.newest(owner="ann")) == []


def test_a_job_that_was_asked_for_before_it_was_there_is_found_once_it_is(store):
    record = make_job(store, owner="ann")
    names = job_names(record.id)
    content = store.storage.read(names.record)
    store.storage.delete(names.record)
    not_found(store, record.id, "ann")
    store.storage.write(names.record, content)
    store.check_owner(record.id, "ann")


def test_a_deleted_job_is_not_found_although_its_owner_is_remembered(store):
    record = make_job(store, owner="ann")
    store.check_owner(record.id, "ann")
    store.delete(record.id)
    with pytest.raises(JobNotFoundError):
        store.files(record.id)
    assert list(store.newest(owner="ann")) == []


def test_each_owner_is_shown_their_own_jobs_newest_first(store):
    made = [(make_job(store, count=1, owner=owner).id, owner) for owner in ("ann", "bob", None, "ann", "bob", "ann")]
    newest_first = sorted(made, reverse=True)
    for owner in ("ann", "bob"):
        assert list(store.newest(owner=owner)) == [job_id for job_id, whose in newest_first if whose == owner]
    assert list(store.newest(owner="cay")) == []
    assert list(store.newest()) == [job_id for job_id, _ in newest_first]
    assert list(store.newest(owner="ann", after=made[5][0])) == [made[3][0], made[0][0]]


def test_a_page_reads_no_more_records_than_it_shows(store, storage_url):
    for owner in ("ann", "bob", "ann", "ann"):
        make_job(store, count=1, owner=owner)
    storage = open_storage(storage_url)
    read, reads = storage.read, []
    storage.read = lambda name: reads.append(name) or read(name)
    newest = sorted(store.newest(), reverse=True)
    found = JobStore(storage).newest(owner="ann")
    assert [next(found), next(found)] == newest[:2]
    assert reads == [job_names(job_id).record for job_id in newest[:2]]


def test_whose_a_job_is_is_read_once(store, storage_url):
    record = make_job(store, owner="ann")
    storage = open_storage(storage_url)
    read, reads = storage.read, []
    storage.read = lambda name: reads.append(name) or read(name)
    other = JobStore(storage)
    for _ in range(3):
        other.check_owner(record.id, "ann")
        not_found(other, record.id, "bob")
    assert len(reads) == 1
