"""Checks the parts of jobs that are done, and writes their manifests, beside what else goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from jobs.errors import JobsError
from jobs.results import FinaliseStoppedError, finalise
from jobs.store import JobStore

logger = logging.getLogger(__name__)


class Finisher:
    """One thread that finishes one job after the other."""

    def __init__(self, store: JobStore, *, read_all: bool, stopping: threading.Event) -> None:
        self._store = store
        self._read_all = read_all
        self._stopping = stopping
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="finisher")
        self._under_way: dict[str, Future[list[int]]] = {}

    def begin(self, job_id: str) -> None:
        """Finish a job, unless that is under way."""
        if job_id not in self._under_way:
            self._under_way[job_id] = self._pool.submit(
                finalise, self._store, job_id, read_all=self._read_all, should_stop=self._stopping.is_set
            )

    def finished(self) -> Iterator[tuple[str, list[int]]]:
        """Yield jobs that have been checked since this was last asked, with the chunks that have to be done anew.

        A job whose check failed is yielded as well: whether it is finished, its files say.
        """
        for job_id in [job_id for job_id, future in self._under_way.items() if future.done()]:
            try:
                bad = self._under_way.pop(job_id).result()
            except FinaliseStoppedError:
                continue
            except JobsError as exc:
                logger.warning("job %s cannot be finished, will try again: %s", job_id, exc)
                bad = []
            if bad:
                logger.error("job %s: parts %s are missing or damaged, and are done anew", job_id, bad)
            yield job_id, bad
