import pytest

from jobs.counting import MAX_COUNTED_PARTS, PartCounter
from jobs.errors import StorageError
from jobs.layout import job_names
from jobs.progress import Counts
from jobs.results import finalise
from tests.sample_jobs import do_chunk, make_job


@pytest.fixture
def record(store):
    return make_job(store)


@pytest.fixture
def reads():
    return []


@pytest.fixture
def counter(store, reads):
    def read(job_id, chunk):
        reads.append(chunk)
        return store.report(job_id, chunk)

    return PartCounter(read)


def test_the_rows_of_finished_parts_are_counted(store, record, counter):
    assert counter.counts(store.files(record.id)) == Counts(0, 0, 0)
    do_chunk(store, record, 0, bad={1})
    do_chunk(store, record, 2, bad={8, 9})
    assert counter.counts(store.files(record.id)) == Counts(succeeded=3, failed=3, truncated=1)


def test_each_report_is_read_once(store, record, counter, reads):
    do_chunk(store, record, 0)
    counter.counts(store.files(record.id))
    do_chunk(store, record, 1)
    for _ in range(3):
        assert counter.counts(store.files(record.id)).succeeded == 8
    assert reads == [0, 1]


def test_a_part_that_was_done_anew_is_counted_anew(store, record, counter):
    do_chunk(store, record, 0, bad={1, 2})
    assert counter.counts(store.files(record.id)).failed == 2
    store.discard_part(record.id, 0)
    assert counter.counts(store.files(record.id)).failed == 0
    do_chunk(store, record, 0)
    assert counter.counts(store.files(record.id)) == Counts(4, 0, 1)


def test_the_manifest_counts_without_a_report(store, record, counter, reads):
    for chunk in range(3):
        do_chunk(store, record, chunk, bad={5})
    assert finalise(store, record.id, read_all=True) == []
    assert counter.counts(store.files(record.id)) == Counts(9, 1, 1)
    store.expire(record.id)
    assert counter.counts(store.files(record.id)) == Counts(9, 1, 1)
    assert reads == []


def test_an_expired_job_without_a_manifest_is_not_counted(store, record, counter):
    do_chunk(store, record, 0)
    store.cancel(record.id)
    store.expire(record.id)
    assert counter.counts(store.files(record.id)) is None


@pytest.mark.parametrize("spoil", ["delete", "damage"])
def test_a_part_whose_report_cannot_be_read_counts_for_nothing_until_it_can(store, record, counter, spoil):
    do_chunk(store, record, 0)
    report, files = do_chunk(store, record, 1), store.files(record.id)
    name = job_names(record.id).report(1)
    if spoil == "delete":
        store.storage.delete(name)
    else:
        store.storage.write(name, b"rubbish")
    assert counter.counts(files).succeeded == 4
    store.count_part(record.id, report)
    assert counter.counts(files).succeeded == 8


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_a_fault_of_the_storage_is_told(store, record):
    def read(_job_id, _chunk):
        raise StorageError("gone")

    do_chunk(store, record, 0)
    with pytest.raises(StorageError):
        PartCounter(read).counts(store.files(record.id))


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_a_job_of_very_many_parts_is_not_counted_before_it_has_a_manifest(store, counter, reads):
    record = make_job(store, count=MAX_COUNTED_PARTS + 1, chunk_rows=1)
    do_chunk(store, record, 0)
    files = store.files(record.id)
    many = type(files)(**vars(files) | {"parts": dict.fromkeys(range(MAX_COUNTED_PARTS + 1), 1)})
    assert counter.counts(many) is None
    assert reads == []
