import io
import json
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.errors import (
    JobNotFoundError,
    JobStateError,
    NoPromptsError,
    NotEnoughSpaceError,
    PartNotFoundError,
    PartNotReadyError,
    RecordFormatError,
    ResultsExpiredError,
    StorageError,
)
from jobs.layout import job_names
from jobs.records import MAX_CHUNK_TOKENS, JobStatus, Prompt
from jobs.results import finalise
from jobs.storage import open_storage
from jobs.store import JobStore
from tests.sample_jobs import do_chunk, make_job, write_part


def status(store, record):
    return store.files(record.id).status()


def finish(store, record):
    for chunk in range(record.num_chunks):
        if not store.has_part(record.id, chunk):
            do_chunk(store, record, chunk)
    assert finalise(store, record.id, read_all=True) == []


def test_a_job_keeps_its_prompts_in_order_in_chunks(store):
    record = make_job(store)
    assert (record.num_prompts, record.num_chunks, record.metadata) == (10, 3, {"k": "v"})
    stored = [pair for chunk in range(3) for pair in store.prompts(record.id, chunk)]
    assert stored == [(n, Prompt(id=f"id{n}", prompt=f"prompt {n}")) for n in range(10)]
    assert [store.num_rows(record.id, chunk) for chunk in range(3)] == [4, 4, 2]
    assert store.load(record.id) == record


def test_a_job_of_more_chunks_than_are_written_at_once_keeps_them_all(store):
    record = make_job(store, count=40, chunk_rows=1)
    stored = [pair for chunk in range(40) for pair in store.prompts(record.id, chunk)]
    assert [index for index, _ in stored] == list(range(40))


def test_options_default_to_the_encoder_and_the_server(store):
    default = make_job(store)
    chosen = make_job(store, dtype="bfloat16", layout="dense", chunk_rows=7, chunk_tokens=32, deduplicate=False)
    assert (default.dtype, default.layout, default.chunk_rows, default.chunk_tokens) == (
        "float32", "own_rows", 4, MAX_CHUNK_TOKENS,
    )  # fmt: skip
    assert (chosen.dtype, chosen.layout, chosen.chunk_rows, chosen.chunk_tokens) == ("bfloat16", "dense", 7, 32)
    assert (default.deduplicate, chosen.deduplicate, chosen.num_chunks) == (True, False, 5)  # 16 rows a dense prompt


def test_another_process_finds_the_same_job(store, storage_url):
    record = make_job(store)
    do_chunk(store, record, 0)
    other = JobStore(open_storage(storage_url))
    assert other.files(record.id) == store.files(record.id)


def test_the_size_of_the_results_is_estimated(store):
    small, large = make_job(store), make_job(store, layout="dense")
    constant_rows = large.num_chunks * (2 + 1) * 4 * 4 * 4 // 3  # in base64
    assert large.estimated_bytes == 10 * 16 * (4 * 4 + 32) + constant_rows
    assert 0 < small.estimated_bytes < large.estimated_bytes


def test_a_job_whose_results_would_not_fit_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(NotEnoughSpaceError) as caught:
        make_job(JobStore(open_storage(str(tmp_path))), reserve_bytes=2**62)
    assert caught.value.needed_bytes > caught.value.room_bytes == 0
    assert f"{2**62} have to stay free (LAYERSTACK_STORAGE_RESERVE_BYTES)" in str(caught.value)
    assert not list(tmp_path.glob("jobs/*"))


@pytest.mark.parametrize("fault", [NoPromptsError, ValueError])
def test_a_job_whose_prompts_cannot_be_read_leaves_nothing_behind(store, fault):
    def prompts():
        if fault is ValueError:
            yield from [Prompt(id="a", prompt="a")] * 90
            raise ValueError

    with pytest.raises(fault):
        make_job(store, prompts=prompts())
    assert store.storage.folders("jobs") == []


def test_a_new_job_whose_prompts_somebody_deletes_meanwhile_is_an_error_and_leaves_nothing(store):
    def prompts():
        for n in range(40):
            yield Prompt(id=str(n), prompt="a")
        (job_id,) = store.storage.folders("jobs")
        store.storage.delete(job_names(job_id).prompts(0))  # long since written: few are under way at a time

    with pytest.raises(StorageError, match="prompts of the new job have been deleted"):
        make_job(store, prompts=prompts(), chunk_rows=1)
    assert store.storage.folders("jobs") == []


def test_a_part_counts_once_it_has_been_checked(store):
    record = make_job(store)
    report = write_part(store, record, 1)
    assert not store.has_part(record.id, 1)
    assert store.files(record.id).parts == {}
    with pytest.raises(PartNotReadyError, match=r"part 1 of job .* is not there yet"):
        store.report(record.id, 1)
    store.count_part(record.id, report)
    assert store.has_part(record.id, 1)
    assert store.files(record.id).parts == {1: report.part.bytes}
    assert store.report(record.id, 1) == report


def test_a_report_without_its_part_does_not_count(store):
    record = make_job(store)
    do_chunk(store, record, 0)
    store.storage.delete(job_names(record.id).part(0))
    assert not store.has_part(record.id, 0)
    assert store.files(record.id).parts == {}


def test_a_discarded_part_is_gone_and_can_be_written_anew(store):
    record = make_job(store)
    do_chunk(store, record, 0, bad={1})
    store.discard_part(record.id, 0)
    assert not store.has_part(record.id, 0)
    assert do_chunk(store, record, 0).part.failed == 0


def test_the_first_of_two_that_write_a_part_wins(store):
    record = make_job(store)
    with pytest.raises(FileExistsError), store.new_part(record.id, 0) as slow:  # noqa: PT012 - the block is what fails
        slow.write(b"late")
        with store.new_part(record.id, 0) as fast:
            fast.write(b"first")
    assert store.storage.read(job_names(record.id).part(0)) == b"first"


def test_failures_are_counted_apart_from_crashes_until_either_is_used_up(store):
    record = make_job(store)
    assert store.failure(record.id, 1) is None
    first = store.note_failure(record.id, 1, "first", crashed=False, limit=2)
    crash = store.note_failure(record.id, 1, "its worker died", crashed=True, limit=2)
    assert (first.attempts, first.crashes, first.gave_up) == (1, 0, False)
    assert (crash.attempts, crash.crashes, crash.gave_up) == (1, 1, False)
    last = store.note_failure(record.id, 1, "second", crashed=False, limit=2)
    assert (last.attempts, last.crashes, last.gave_up, last.error) == (2, 1, True, "second")
    assert store.failure(record.id, 1) == last
    assert store.files(record.id).failures == {1: last}


def test_one_listing_tells_which_marks_a_job_has(store):
    record = make_job(store)
    store.cancel(record.id)
    own = job_names(record.id)
    assert set(store.marks(record.id)) == {own.record, own.chunks, own.cancelled}
    store.storage.delete(own.record)
    with pytest.raises(JobNotFoundError):
        store.marks(record.id)


def test_two_that_finish_a_job_keep_the_first_manifest(store):
    record = make_job(store, count=1)
    finish(store, record)
    manifest = store.manifest(record.id)
    store.write_manifest(record.id, manifest.model_copy(update={"rows": 99}))
    assert store.manifest(record.id) == manifest


def test_a_cancelled_job_keeps_its_parts_and_retry_lets_it_go_on(store):
    record = make_job(store)
    do_chunk(store, record, 0)
    assert not store.is_cancelled(record.id)
    store.cancel(record.id)
    store.cancel(record.id)
    assert store.is_cancelled(record.id)
    assert (status(store, record), store.has_part(record.id, 0)) == (JobStatus.CANCELLED, True)
    store.retry(record.id)
    assert not store.is_cancelled(record.id)
    assert status(store, record) == JobStatus.RUNNING


def test_a_finished_job_cannot_be_cancelled(store):
    record = make_job(store)
    finish(store, record)
    with pytest.raises(JobStateError, match=f"job {record.id} is succeeded and cannot be cancelled"):
        store.cancel(record.id)
    assert not store.is_cancelled(record.id)


def test_retry_gives_a_failed_job_all_its_attempts_again(store):
    record = make_job(store, count=8)
    do_chunk(store, record, 0)
    store.note_failure(record.id, 1, "x", crashed=False, limit=1)
    assert status(store, record) == JobStatus.FAILED
    store.retry(record.id)
    assert status(store, record) == JobStatus.RUNNING
    assert store.failure(record.id, 1) is None


def test_retry_has_a_job_that_succeeded_checked_again(store):
    record = make_job(store)
    finish(store, record)
    store.retry(record.id)
    assert status(store, record) == JobStatus.RUNNING
    finish(store, record)
    assert status(store, record) == JobStatus.SUCCEEDED


def test_an_expired_job_keeps_its_record_and_manifest_and_cannot_go_on(store):
    record = make_job(store)
    finish(store, record)
    store.expire(record.id)
    before = store.files(record.id).expired
    store.expire(record.id)
    files = store.files(record.id)
    assert files.expired == before
    assert (files.status(), files.manifest.rows) == (JobStatus.EXPIRED, 10)
    assert store.storage.folders(job_names(record.id).folder) == []
    for ask in (lambda: store.manifest(record.id), lambda: store.part_name(record.id, 0)):
        with pytest.raises(ResultsExpiredError, match="expired at"):
            ask()
    with pytest.raises(JobStateError, match="has expired"):
        store.retry(record.id)


def test_a_deleted_job_is_gone_from_the_first_moment(store):
    record, other = make_job(store), make_job(store)
    do_chunk(store, record, 0)
    store.delete(record.id)
    assert list(store.newest()) == [other.id]
    assert store.is_cancelled(record.id)
    assert store.storage.folders("jobs") == [other.id]
    for ask in (store.load, store.files, store.delete, store.manifest):
        with pytest.raises(JobNotFoundError):
            ask(record.id)
    with pytest.raises(JobNotFoundError):
        next(store.prompts(record.id, 0))


def test_jobs_are_listed_newest_first(store):
    ids = [make_job(store, count=1).id for _ in range(7)]
    store.storage.write("jobs/not-a-job/job.json", b"{}")
    store.storage.write("jobs/01M8259KQ6ZM43ZW7F9E4YQJWV/prompts/00000.parquet", b"")  # an upload that never ended
    newest_first = sorted(ids, reverse=True)
    assert list(store.newest()) == newest_first
    assert list(store.newest(after=newest_first[1])) == newest_first[2:]


@pytest.mark.parametrize("job_id", ["", "..", "../..", "01M8259KQ6ZM43ZW7F9E4YQJWV", "01M8259KQ6ZM43ZW7F9E4YQJW\n"])
def test_an_unknown_job_is_an_error_and_no_name_is_made_of_its_id(store, job_id):
    for call in (store.load, store.files, store.manifest, store.cancel, store.retry, store.delete):
        with pytest.raises(JobNotFoundError):
            call(job_id)


def test_a_part_that_is_not_there_yet_tells_the_status_of_its_job(store):
    record = make_job(store)
    with pytest.raises(PartNotReadyError, match=r"part 0 .* not there yet: the job is queued"):
        store.part_name(record.id, 0)
    for number in (3, -1, 10**300):
        with pytest.raises(PartNotFoundError, match=f"has no part {number}: its parts are 0 to 2"):
            store.part_name(record.id, number)
    with pytest.raises(PartNotReadyError, match="no results yet: it is queued"):
        store.manifest(record.id)


def test_a_part_that_counts_has_a_name_in_the_storage(store):
    record = make_job(store)
    do_chunk(store, record, 2)
    content = store.storage.read(store.part_name(record.id, 2))
    assert pq.read_table(io.BytesIO(content))["id"].to_pylist() == ["id8", "id9"]


@pytest.mark.parametrize("name", ["record", "chunks", "manifest", "cancelled"])
@pytest.mark.parametrize("content", [b"", b'{"version": 2}', b"\xff"])
def test_a_json_file_that_cannot_be_read_is_an_error_that_names_it(store, storage_url, name, content):
    path = getattr(job_names(make_job(store, count=1).id), name)
    store.storage.write(path, content)
    with pytest.raises(RecordFormatError, match=rf"{path} is damaged[^\n]*$"):
        JobStore(open_storage(storage_url)).files(path.split("/")[1])


@pytest.mark.parametrize("content", [b"", b"rubbish", "another file", "half of it"])
def test_prompts_that_are_damaged_are_an_error_that_names_the_file(store, content):
    record = make_job(store)
    name = job_names(record.id).prompts(1)
    if content == "another file":
        file = io.BytesIO()
        pq.write_table(pa.table({"index": [1], "prompt": ["a"]}), file)
        content = file.getvalue()
    elif content == "half of it":
        content = store.storage.read(name)[:-20] + b"\xff" * 12 + store.storage.read(name)[-8:]
    store.storage.write(name, content)
    with pytest.raises(RecordFormatError, match=f"{name} is damaged"):
        list(store.prompts(record.id, 1))


def test_prompts_that_are_missing_are_told_apart_from_a_deleted_job(store, storage_url):
    names = job_names(make_job(store).id)
    job_id = names.folder.split("/")[1]
    store.storage.delete(names.prompts(1))
    with pytest.raises(RecordFormatError, match="the prompts of chunk 1 are missing"):
        next(store.prompts(job_id, 1))
    store.storage.delete(names.chunks)
    with pytest.raises(RecordFormatError, match=r"chunks\.json is missing"):
        JobStore(open_storage(storage_url)).files(job_id)


def test_what_was_asked_is_never_written_twice(store):
    record = make_job(store)
    stored = json.loads(store.storage.read(job_names(record.id).record))
    finish(store, record)
    store.expire(record.id)
    assert json.loads(store.storage.read(job_names(record.id).record)) == stored


def test_many_threads_may_count_parts_of_one_job(store):
    record = make_job(store, count=16, chunk_rows=1)
    threads = [threading.Thread(target=do_chunk, args=(store, record, chunk)) for chunk in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.files(record.id).parts) == 16
    finish(store, record)


def test_the_first_chunk_that_is_begun_is_when_the_job_started(store, storage_url):
    record = make_job(store)
    assert (store.files(record.id).started, status(store, record)) == (None, JobStatus.QUEUED)
    store.begin(record.id)
    first = store.files(record.id).started
    store.begin(record.id)
    JobStore(open_storage(storage_url)).begin(record.id)
    assert store.files(record.id).started == first
    assert status(store, record) == JobStatus.RUNNING


def test_that_a_job_has_started_is_looked_up_once(store, storage_url):
    record = make_job(store)
    storage = open_storage(storage_url)
    size, asked = storage.size, []
    storage.size = lambda name: asked.append(name) or size(name)
    other = JobStore(storage)
    for _ in range(3):
        other.begin(record.id)
    assert asked == [job_names(record.id).started]


def test_a_job_keeps_when_it_started_through_retry_and_expiry(store):
    record = make_job(store)
    store.begin(record.id)
    started = store.files(record.id).started
    finish(store, record)
    store.retry(record.id)
    assert store.files(record.id).started == started
    finish(store, record)
    store.expire(record.id)
    assert store.files(record.id).started == started


def test_a_job_that_ends_with_the_first_failure_has_failed_at_once_and_is_stopped(store):
    record, patient = make_job(store, on_error="fail"), make_job(store)
    for each in (record, patient):
        do_chunk(store, each, 0)
        store.note_failure(each.id, 1, "its worker died", crashed=True, limit=5)
        assert not store.is_stopped(each.id)
        store.note_failure(each.id, 1, "prompt 5 failed", crashed=False, limit=1)
    assert (status(store, record), store.is_stopped(record.id)) == (JobStatus.FAILED, True)
    assert (status(store, patient), store.is_stopped(patient.id)) == (JobStatus.RUNNING, False)
    with pytest.raises(JobStateError, match="is failed and cannot be cancelled"):
        store.cancel(record.id)
    store.retry(record.id)
    assert (status(store, record), store.is_stopped(record.id)) == (JobStatus.RUNNING, False)


def test_a_failure_that_was_overcome_stops_nothing(store):
    record = make_job(store, on_error="fail")
    store.note_failure(record.id, 1, "x", crashed=False, limit=1)
    do_chunk(store, record, 1)
    assert (status(store, record), store.is_stopped(record.id)) == (JobStatus.RUNNING, False)


def test_a_job_that_is_cancelled_or_deleted_is_stopped(store):
    cancelled, deleted = make_job(store, on_error="fail"), make_job(store, on_error="fail")
    store.cancel(cancelled.id)
    store.delete(deleted.id)
    assert store.is_stopped(cancelled.id)
    assert store.is_stopped(deleted.id)
