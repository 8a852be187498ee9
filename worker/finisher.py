"""Checks the parts of jobs that are done, and writes their manifests, beside what else goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from jobs.errors import JobsError
from jobs.results import FinaliseStoppedError, finalise
from jobs.store import JobStore

logger = logging.getLogger(__name__)
_PAUSE_S = 10.0


class Finisher:
    """One thread that finishes one job after the other."""

    def __init__(self, store: JobStore, *, read_all: bool, stopping: threading.Event) -> None:
        self._store = store
        self._read_all = read_all
        self._stopping = stopping
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="finisher")
        self._under_way: dict[str, Future[list[int]]] = {}
        self._not_before: dict[str, float] = {}

    def begin(self, job_id: str) -> None:
        """Finish a job, unless that is under way, or failed a moment ago."""
        if job_id not in self._under_way and time.monotonic() >= self._not_before.get(job_id, 0.0):
            self._under_way[job_id] = self._pool.submit(
                finalise, self._store, job_id, read_all=self._read_all, should_stop=self._stopping.is_set
            )

    def finished(self) -> Iterator[tuple[str, list[int] | JobsError]]:
        """Yield jobs that have been checked since this was last asked.

        With each come the chunks that have to be done anew, or why it could not be checked: it will be tried again.
        """
        for job_id in [job_id for job_id, future in self._under_way.items() if future.done()]:
            self._not_before.pop(job_id, None)
            try:
                outcome: list[int] | JobsError = self._under_way.pop(job_id).result()
            except FinaliseStoppedError:
                continue
            except JobsError as exc:
                logger.warning("job %s cannot be finished, will try again: %s", job_id, exc)
                self._not_before[job_id] = time.monotonic() + _PAUSE_S
                outcome = exc
            if outcome and not isinstance(outcome, JobsError):
                logger.error("job %s: parts %s are missing or damaged, and are done anew", job_id, outcome)
            yield job_id, outcome
