"""Checks the parts of jobs that are done, and writes their manifests, beside what else goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from jobs.errors import JobsError, StorageError
from jobs.results import FinaliseStoppedError, Verified, finalise
from jobs.store import JobStore

logger = logging.getLogger(__name__)
_PAUSE_S = 10.0
# Jobs that are checked side by side, so that a small one does not wait for a large one.
_JOBS_AT_ONCE = 4
_LOOK_FOR_CANCEL_EVERY_S = 2.0


class Finisher:
    """A few threads that finish jobs; a context manager that waits for them to stop.

    Args:
        store: where the jobs are.
        read_all: whether each part is read, or only its footer.
        should_stop: asked before each part: whoever does not lead any more must not delete a part.
    """

    def __init__(self, store: JobStore, *, read_all: bool, should_stop: Callable[[], bool]) -> None:
        self._store = store
        self._read_all = read_all
        self._should_stop = should_stop
        self._leaving = threading.Event()
        self._pool = ThreadPoolExecutor(_JOBS_AT_ONCE, thread_name_prefix="finisher")
        self._under_way: dict[str, Future[list[int]]] = {}
        self._not_before: dict[str, float] = {}
        self._verified: dict[str, Verified] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._leaving.set()
        self._pool.shutdown(cancel_futures=True)

    def begin(self, job_id: str) -> None:
        """Finish a job, unless that is under way, or failed a moment ago."""
        if job_id not in self._under_way and time.monotonic() >= self._not_before.get(job_id, 0.0):
            verified = self._verified.setdefault(job_id, Verified())
            self._under_way[job_id] = self._pool.submit(self._finalise, job_id, verified)

    def finished(self) -> Iterator[tuple[str, list[int] | Exception]]:
        """Yield jobs that have been checked since this was last asked.

        With each come the chunks that have to be done anew, or why it could not be checked: it will be tried again.
        """
        for job_id in [job_id for job_id, future in self._under_way.items() if future.done()]:
            outcome = self._outcome(job_id, self._under_way.pop(job_id))
            if isinstance(outcome, Exception):
                self._not_before[job_id] = time.monotonic() + _PAUSE_S
            else:
                self._not_before.pop(job_id, None)
            if not isinstance(outcome, StorageError):  # else what was read until then need not be read again
                del self._verified[job_id]
            yield job_id, outcome

    def _finalise(self, job_id: str, verified: Verified) -> list[int]:
        looked_at = time.monotonic()

        def should_stop() -> bool:
            nonlocal looked_at
            if self._leaving.is_set() or self._should_stop():
                return True
            if time.monotonic() - looked_at < _LOOK_FOR_CANCEL_EVERY_S:
                return False
            looked_at = time.monotonic()
            return self._store.is_cancelled(job_id)

        return finalise(self._store, job_id, read_all=self._read_all, should_stop=should_stop, verified=verified)

    def _outcome(self, job_id: str, future: Future[list[int]]) -> list[int] | Exception:
        try:
            bad = future.result()
        except FinaliseStoppedError:
            return []  # cancelled or deleted, which its files tell
        except JobsError as exc:
            logger.warning("job %s cannot be finished, will try again: %s", job_id, exc)
            return exc
        except Exception as exc:  # whatever it is, the other jobs go on
            logger.exception("job %s cannot be finished, will try again", job_id)
            return exc
        if bad:
            logger.error("job %s: parts %s are missing or damaged, and are done anew", job_id, _few(bad))
        return bad


def _few(chunks: list[int]) -> str:
    shown = ", ".join(map(str, chunks[:10]))
    return shown if len(chunks) <= 10 else f"{shown} and {len(chunks) - 10} more"  # noqa: PLR2004 - the same ten
