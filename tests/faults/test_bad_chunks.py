"""A chunk that cannot be done ends in a job that says so, with all others done; `retry` does only what is missing."""

from contextlib import contextmanager

import pytest

from jobs.layout import job_names
from jobs.records import JobStatus
from tests.faults.checks import check_results, view_of
from tests.faults.workload import entries, submit

JOB_ROWS = 100
BAD = 4


@contextmanager
def workers_wait(cluster):
    """Let the workers see nothing of what happens meanwhile, for less time than a lease lasts."""
    workers = cluster.ready_workers()
    for worker in workers:
        worker.freeze()
    try:
        yield
    finally:
        for worker in workers:
            worker.thaw()


def failed(cluster, job):
    view = view_of(cluster, job)
    assert view["status"] != JobStatus.SUCCEEDED
    return view["status"] == JobStatus.FAILED


def identities(cluster, job):
    """What changes if a part is written again."""
    storage, names = cluster.store.storage, job_names(job.id)
    paths = [storage.local_path(name(chunk)) for chunk in range(job.num_chunks) for name in (names.part, names.report)]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths if path.exists()}


def check_failed_then_retried(cluster, job, known, repair):
    """The job has failed because of one chunk: the others are there, and stay as they are when it is done at last."""
    assert cluster.counted(job.id) == set(range(job.num_chunks)) - {BAD}
    parts = [cluster.http.get(f"/jobs/{job.id}/parts/{chunk}").status_code for chunk in range(job.num_chunks)]
    assert parts == [404 if chunk == BAD else 200 for chunk in range(job.num_chunks)]
    done = identities(cluster, job)
    assert len(done) == 2 * (job.num_chunks - 1)
    repair()
    assert cluster.http.post(f"/jobs/{job.id}/retry").status_code == 202
    check_results(cluster, job, known)
    assert done.items() <= identities(cluster, job).items()


@pytest.mark.parametrize("damage", ["not Parquet", "cut off", "missing"])
def test_a_chunk_whose_prompts_cannot_be_read_is_given_up_after_its_attempts(cluster, rng, known, damage):
    with workers_wait(cluster):
        job = submit(cluster, rng, entries(rng, list(known), JOB_ROWS))
        path = cluster.store.storage.local_path(job_names(job.id).prompts(BAD))
        content = path.read_bytes()
        path.unlink()
        if damage != "missing":
            path.write_bytes(content[: len(content) // 2] if damage == "cut off" else b"none")
    cluster.until(lambda: failed(cluster, job), f"job {job.id} has failed")
    assert f"chunk {BAD}, after 2 attempts" in view_of(cluster, job)["error"]
    check_failed_then_retried(cluster, job, known, lambda: path.write_bytes(content))


def test_a_chunk_that_kills_its_workers_is_given_up_and_takes_no_other_with_it(cluster, rng, known):
    deadly = cluster.folder / "deadly"
    crashes = 3
    with workers_wait(cluster):
        job = submit(cluster, rng, entries(rng, list(known), JOB_ROWS))
        deadly.write_text(str(cluster.store.storage.local_path(job_names(job.id).prompts(BAD))))
    deaths = 0

    def has_failed() -> bool:
        nonlocal deaths
        for worker in cluster.workers:
            if not worker.alive:
                deaths += 1
                worker.start()
        return failed(cluster, job)

    cluster.until(has_failed, f"job {job.id} has failed", workers_may_die=True)
    assert deaths >= crashes
    assert f"chunk {BAD}, after {crashes} attempts: its worker died" == view_of(cluster, job)["error"]
    # The broker delivers what the dead had once more; nobody dies of that.
    cluster.until(lambda: not cluster.redis.exists("unacked"), "the messages of dead workers are gone")
    check_failed_then_retried(cluster, job, known, deadly.unlink)
