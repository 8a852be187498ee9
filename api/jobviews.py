"""What is shown of a job: what its files say, and what Redis tells beside them."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from api.live import live_jobs
from api.services import Services
from jobs.progress import NOTHING_LIVE, JobFiles, Live
from jobs.records import JobStatus, JobView
from jobs.store import JobStore


@dataclass(frozen=True)
class Look:
    """A job at one moment.

    Attributes:
        files: what they say.
        view: what is shown.
        is_over: nothing more happens unless somebody asks for it. A job that looks cancelled because the broker does
            not tell that chunks are still being put down is not over.
    """

    files: JobFiles
    view: JobView
    is_over: bool


async def look_at(services: Services, job_id: str, *, parts_after: int | None = None, parts_limit: int = 100) -> Look:
    """Look at a job; of its parts, as many are shown as are asked for.

    Raises:
        JobNotFoundError: there is none.
        RecordFormatError: one of its files cannot be read.
        StorageError: the storage fails.
    """
    [live] = await live_jobs(services.redis, [job_id])
    return await run_in_threadpool(_look, services.store, job_id, live, parts_after, parts_limit)


def _look(store: JobStore, job_id: str, live: Live, parts_after: int | None, parts_limit: int) -> Look:
    files = store.files(job_id)
    view = files.view(live, counts=store.counts(files), parts_after=parts_after, parts_limit=parts_limit)
    is_unsure = view.status is JobStatus.CANCELLED and live is NOTHING_LIVE
    return Look(files, view, is_over=view.status.is_final and not is_unsure)
