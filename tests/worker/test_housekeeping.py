import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from ulid import ULID

from jobs.layout import job_names
from jobs.records import JobStatus, Mark
from jobs.results import finalise
from tests.sample_jobs import do_chunk, make_job
from tests.support import wait_for
from worker.housekeeping import Housekeeper

HOUR = timedelta(hours=1)
# Begins a part in the folder that it is given, and tells so.
WRITER = """
import sys
from pathlib import Path
from jobs.files import written_whole
with written_whole(Path(sys.argv[1])) as file:
    print("begun", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def finished(store):
    record = make_job(store)
    for chunk in range(3):
        do_chunk(store, record, chunk)
    finalise(store, record.id, read_all=False)
    return record


def housekeeper(store, retention=None, abandoned_after=HOUR):
    return Housekeeper(store, retention=retention, abandoned_after=abandoned_after)


def expire(store, record, **options):
    return housekeeper(store, **options).expire(record.id, store.files(record.id))


def test_results_stay_until_their_time_is_up(store, finished):
    assert not expire(store, finished, retention=HOUR)
    assert not expire(store, finished, retention=None)
    assert store.has_part(finished.id, 0)
    time_is_up = datetime.now(UTC) - store.manifest(finished.id).finished_at
    assert expire(store, finished, retention=time_is_up)
    assert store.files(finished.id).status() == JobStatus.EXPIRED
    assert store.storage.folders(job_names(finished.id).folder) == []


def test_the_time_of_a_cancelled_or_failed_job_counts_from_its_end(store):
    cancelled, failed = make_job(store), make_job(store, count=4)
    do_chunk(store, cancelled, 0)
    store.cancel(cancelled.id)
    store.note_failure(failed.id, 0, "x", crashed=False, limit=1)
    for record in (cancelled, failed):
        assert not expire(store, record, retention=HOUR)
        assert expire(store, record, retention=timedelta(0))
        assert store.files(record.id).status() == JobStatus.EXPIRED
    assert not store.has_part(cancelled.id, 0)


def test_a_job_that_is_not_finished_never_expires(store):
    record = make_job(store)
    do_chunk(store, record, 0)
    assert not expire(store, record, retention=timedelta(0))
    assert store.has_part(record.id, 0)


def test_one_listing_tells_of_a_job_that_has_ended_whether_there_is_anything_to_do(store, finished):
    running, cancelled = make_job(store), make_job(store)
    store.cancel(cancelled.id)

    def keeps(record, retention):
        return housekeeper(store, retention=retention).keeps(record.id, store.marks(record.id))

    for record, has_ended in ((finished, True), (cancelled, True), (running, False)):
        assert keeps(record, None) == keeps(record, HOUR) == has_ended
        assert not keeps(record, timedelta(0))
    store.expire(finished.id)
    assert not keeps(finished, None)


def test_a_job_that_was_retried_since_its_files_were_read_does_not_expire(store, finished):
    files = store.files(finished.id)
    store.retry(finished.id)
    assert not housekeeper(store, retention=timedelta(0)).expire(finished.id, files)
    assert store.has_part(finished.id, 0)


def test_what_an_interrupted_expiry_left_is_deleted(store, finished):
    mark = Mark(at=datetime.now(UTC))
    store.storage.write(job_names(finished.id).expired, mark.model_dump_json().encode())
    assert store.has_part(finished.id, 0)
    assert expire(store, finished, retention=None)
    assert not store.has_part(finished.id, 0)


def test_an_upload_that_was_cut_off_is_removed_once_nothing_has_changed_for_long(store):
    job_id, other = str(ULID()), make_job(store)
    for chunk in range(7):
        store.storage.write(job_names(job_id).prompts(chunk), b"x")
    housekeeper(store).remove_abandoned(job_id)
    assert len(store.storage.files(job_names(job_id).prompts_folder)) == 7
    keeper = housekeeper(store, abandoned_after=timedelta(seconds=0.1))
    wait_for(lambda: keeper.remove_abandoned(job_id) or store.storage.folders("jobs") == [other.id])


def test_an_upload_of_which_nothing_is_left_is_no_fault(store):
    housekeeper(store).remove_abandoned(str(ULID()))


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
@pytest.mark.parametrize("folder", ["parts", "prompts", "failures", ""])
def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(store, finished, folder):
    path = store.storage.local_path(f"{job_names(finished.id).folder}/{folder}/00000.new")
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"begun\n"
        housekeeper(store).remove_unfinished(finished.id)
        assert len(list(path.parent.iterdir())) == len(before) + 1
        writer.kill()
    housekeeper(store).remove_unfinished(finished.id)
    assert sorted(path.parent.iterdir()) == before
