"""Pages of a caller's jobs, newest first. A page looks into a bounded number of jobs, however few suit its filter."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator, Sequence
from itertools import islice

from anyio import CapacityLimiter, to_thread
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from api.live import live_jobs
from api.services import Services
from jobs.errors import JobNotFoundError, RecordFormatError
from jobs.progress import NOTHING_LIVE, Live
from jobs.records import JobStatus, JobView
from jobs.store import JobStore

logger = logging.getLogger(__name__)

MAX_LOOKS = 500
"""Jobs that are looked at for one page."""
_LOOKS_AT_ONCE = 50
# An object store takes long for each. Those of all lists together, which so take no threads from other requests.
_THREADS = CapacityLimiter(10)


class JobPage(BaseModel):
    """A page of jobs, newest first."""

    jobs: list[JobView] = Field(description="without their parts")
    next: str | None = Field(description="give it as `after` for the next page; null on the last")


async def list_page(
    services: Services, *, owner: str | None, after: str | None, limit: int, states: Collection[JobStatus]
) -> JobPage:
    """Return a page of the jobs of `owner`.

    Args:
        services: where the jobs are.
        owner: whose jobs; None are those of all.
        after: show jobs older than this.
        limit: how many to show at most.
        states: show jobs in these states only; none are all.
    """
    ids = services.store.newest(after=after, owner=owner)
    some: list[str] = []
    shown: list[JobView] = []
    last: str | None = None
    looks, asks_broker = 0, True
    while len(shown) < limit and looks < MAX_LOOKS:
        # Without a filter all that are looked at are shown.
        size = min(_LOOKS_AT_ONCE if states else limit - len(shown), MAX_LOOKS - looks)
        some = await run_in_threadpool(_take, ids, size)
        if not some:
            break
        looks += len(some)
        live = await live_jobs(services.redis, some) if asks_broker else [NOTHING_LIVE] * len(some)
        asks_broker = live[0] is not NOTHING_LIVE  # one that hangs costs its timeout once
        for view in await _views(services.store, some, live):
            last = some.pop(0)
            if view is not None and (not states or view.status in states):
                shown.append(view)
                if len(shown) == limit:
                    break
    is_more = bool(some or await run_in_threadpool(_take, ids, 1))
    return JobPage(jobs=shown, next=last if is_more else None)


def _take(ids: Iterator[str], count: int) -> list[str]:
    return list(islice(ids, count))


async def _views(store: JobStore, job_ids: Sequence[str], live: Sequence[Live]) -> list[JobView | None]:
    """Return what is shown of each job, or None of one that cannot be shown."""
    looks = (
        to_thread.run_sync(_view, store, job_id, each, limiter=_THREADS)
        for job_id, each in zip(job_ids, live, strict=True)
    )
    return await asyncio.gather(*looks)


def _view(store: JobStore, job_id: str, live: Live) -> JobView | None:
    try:
        return store.files(job_id).view(live, parts_limit=0)
    except JobNotFoundError:
        return None  # deleted since it was listed
    except RecordFormatError as exc:
        logger.error("left out of the list: %s", exc)  # noqa: TRY400 - the message says it all
        return None
