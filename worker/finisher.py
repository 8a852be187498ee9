"""Checks the parts of jobs that are done, and writes their manifests, beside what else goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Self

from jobs.errors import JobsError, StorageError
from jobs.results import FinaliseStoppedError, Verified, finalise
from jobs.store import JobStore

logger = logging.getLogger(__name__)
_PAUSE_S = 10.0
# Jobs that are checked side by side, so that a small one does not wait for a large one.
_JOBS_AT_ONCE = 4
_LOOK_FOR_CANCEL_EVERY_S = 2.0


@dataclass(eq=False)
class _Finishing:
    """A job that is being finished, or will be again after `not_before`; `verified` is what was found good so far."""

    verified: Verified = field(default_factory=Verified)
    unwanted: threading.Event = field(default_factory=threading.Event)
    future: Future[list[int]] | None = None
    not_before: float = 0.0


class Finisher:
    """A few threads that finish jobs; a context manager that waits for them to stop.

    Args:
        store: where the jobs are.
        read_all: whether each part is read, or only its footer.
        should_stop: asked before each piece of a part: whoever does not lead any more must not delete a part.
    """

    def __init__(self, store: JobStore, *, read_all: bool, should_stop: Callable[[], bool]) -> None:
        self._store = store
        self._read_all = read_all
        self._should_stop = should_stop
        self._leaving = threading.Event()
        self._pool = ThreadPoolExecutor(_JOBS_AT_ONCE, thread_name_prefix="finisher")
        self._jobs: dict[str, _Finishing] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._leaving.set()
        self._pool.shutdown(cancel_futures=True)

    def finish(self, complete: Collection[str]) -> None:
        """Finish the jobs `complete`, unless that is under way, or failed a moment ago; and no others.

        What was found good of a job that is not complete any more is forgotten: its parts are done anew.
        """
        for job_id in self._jobs.keys() - set(complete):
            self._jobs[job_id].unwanted.set()
            if self._jobs[job_id].future is None:
                del self._jobs[job_id]
        for job_id in complete:
            job = self._jobs.setdefault(job_id, _Finishing())
            if job.future is None and time.monotonic() >= job.not_before:
                job.future = self._pool.submit(self._finalise, job_id, job)

    def finished(self) -> Iterator[tuple[str, list[int] | Exception]]:
        """Yield jobs that have been checked since this was last asked.

        With each come the chunks that have to be done anew, or why it could not be checked: it will be tried again.
        """
        for job_id, job in list(self._jobs.items()):
            if job.future is None or not job.future.done():
                continue
            outcome = self._outcome(job_id, job.future)
            del self._jobs[job_id]
            if isinstance(outcome, Exception) and not job.unwanted.is_set():
                # After a fault of the storage, what was read until then need not be read again.
                verified = job.verified if isinstance(outcome, StorageError) else Verified()
                self._jobs[job_id] = _Finishing(verified, not_before=time.monotonic() + _PAUSE_S)
            yield job_id, outcome

    def _finalise(self, job_id: str, job: _Finishing) -> list[int]:
        looked_at = time.monotonic()

        def should_stop() -> bool:
            nonlocal looked_at
            if self._leaving.is_set() or job.unwanted.is_set() or self._should_stop():
                return True
            if time.monotonic() - looked_at < _LOOK_FOR_CANCEL_EVERY_S:
                return False
            looked_at = time.monotonic()
            return self._store.is_cancelled(job_id)

        return finalise(self._store, job_id, read_all=self._read_all, should_stop=should_stop, verified=job.verified)

    def _outcome(self, job_id: str, future: Future[list[int]]) -> list[int] | Exception:
        try:
            bad = future.result()
        except FinaliseStoppedError:
            return []  # cancelled, deleted or not complete any more, which its files tell
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
