"""The Celery tasks: read the message, call one plain function, map its errors to an answer for the queue."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

from celery import Celery, Task
from celery.exceptions import Reject
from pydantic import ValidationError
from redis import Redis, RedisError

from encoder import DeadlineExceededError, Engine, EngineClosedError
from jobs import keys, tracing
from jobs.errors import JobNotFoundError, StorageError
from jobs.messages import ChunkMessage, JobEvent, PredictFailure, PredictMessage, pack_reply
from jobs.queue import CHUNK_TASK, PREDICT_TASK
from worker.chunks import ChunkEncoder
from worker.errors import (
    ChunkStoppedError,
    DeviceLostError,
    FingerprintMismatchError,
    HandedBackError,
    JobCancelledError,
    LeaseLostError,
    PromptFailedError,
)
from worker.leases import Lease, Leases
from worker.notes import JobNotes
from worker.predict import answer
from worker.turns import Turns
from worker.withdrawals import WatchedRequest, Withdrawals

logger = logging.getLogger(__name__)
# A job's trouble is shown for longer than the pause before the next try, which tells of it again.
_TROUBLE_SHOWN_S = 150.0
_PROGRESS_EVERY_S = 0.2
_LOOK_AT_FILES_EVERY_S = 2.0
# Before a chunk for another encoder goes back to the queue, where its own workers have to be faster.
_NOT_MINE_PAUSE_S = 0.5


@dataclass(frozen=True)
class Tasks:
    """The tasks of one worker process, with what they need."""

    engine: Engine
    chunks: ChunkEncoder
    leases: Leases
    notes: JobNotes
    reply_redis: Redis
    chunk_attempts: int
    chunk_crashes: int
    withdrawals: Withdrawals
    stopping: threading.Event
    turns: Turns

    def register(self, app: Celery) -> None:
        """Make the tasks known to `app`."""

        def predict(task: Task[..., None], message: dict[str, Any]) -> None:
            with tracing.working(PREDICT_TASK, task.request.headers):
                self.predict(message)

        def chunk(task: Task[..., None], message: dict[str, Any]) -> None:
            with tracing.working(CHUNK_TASK, task.request.headers):
                self.chunk(message)

        # Not shared: the other app of this process registers its own.
        app.task(name=PREDICT_TASK, shared=False, bind=True)(predict)
        app.task(name=CHUNK_TASK, shared=False, bind=True)(chunk)

    def predict(self, message: dict[str, Any]) -> None:
        """Answer a request, unless nobody waits for the answer any more.

        Args:
            message: a `PredictMessage` as JSON.

        Raises:
            Reject: the message goes back to the queue, because this worker is stopping.
        """
        try:
            request = PredictMessage.model_validate(message)
        except ValidationError as exc:
            logger.error("a predict message that cannot be read is dropped: %d errors", exc.error_count())  # noqa: TRY400 - prompts stay out of logs
            return
        if time.time() > request.deadline:
            logger.info("request %s: its deadline has passed, dropped", request.request_id)
            return
        with self.withdrawals.watched(request.request_id) as watched:
            reply = None if watched.withdrawn else self._answer(request, watched)
            if watched.withdrawn:
                logger.info("request %s: nobody waits for it any more, dropped", request.request_id)
            elif reply is not None:
                self._reply(request, reply)

    def _answer(self, request: PredictMessage, watched: WatchedRequest) -> bytes | None:
        """Encode a request -> its reply; None if nobody waits for one."""
        try:
            return pack_reply(answer(self.engine, request, watched))
        except CancelledError:
            return None
        except DeadlineExceededError as exc:
            logger.info("request %s: %s, dropped", request.request_id, exc)
            return None
        except EngineClosedError as exc:
            logger.info("request %s is handed back: %s", request.request_id, exc)
            raise Reject(str(exc), requeue=True) from exc
        except Exception:  # whatever it is, the client is told rather than left waiting
            logger.exception("request %s failed", request.request_id)
            return pack_reply(PredictFailure(position=None, reason="the encoder failed; the worker's log says why"))

    def _reply(self, request: PredictMessage, reply: bytes) -> None:
        key = keys.reply(request.request_id)
        with self.reply_redis.pipeline() as pipe:
            pipe.rpush(key, reply)
            pipe.expire(key, keys.REPLY_TTL_S)
            pipe.execute()

    def chunk(self, message: dict[str, Any]) -> None:
        """Encode a chunk, and tell the reconciler what came of it: it decides what happens next.

        Args:
            message: a `ChunkMessage` as JSON.

        Raises:
            Reject: the message goes back to the queue, because this worker is stopping, or runs another encoder.
        """
        try:
            request = ChunkMessage.model_validate(message)
        except ValidationError:
            logger.exception("a chunk message that cannot be read is dropped: %r", message)
            return
        with tracing.about(job_id=request.job_id, chunk=request.chunk):
            self._chunk(request)

    def _chunk(self, request: ChunkMessage) -> None:
        job_id, chunk = request.job_id, request.chunk
        lease = self._lease(job_id, chunk)
        if lease is None:
            logger.info("chunk %d of job %s is with another worker, dropped", chunk, job_id)
            return
        try:
            what = self._encode(request, lease)
            if what is not None:
                self.notes.put_down(job_id, chunk)
                self.notes.tell(what)
        except (HandedBackError, FingerprintMismatchError) as exc:
            logger.info("chunk %d of job %s is handed back: %s", chunk, job_id, exc)
            self.notes.put_down(job_id, chunk)
            if isinstance(exc, FingerprintMismatchError):
                self.stopping.wait(_NOT_MINE_PAUSE_S)
            raise Reject(str(exc), requeue=True) from exc
        finally:  # whatever it was: a lease that is not given up is renewed for as long as this worker lives
            self.leases.release(lease)

    def _lease(self, job_id: str, chunk: int) -> Lease | None:
        try:
            return self.leases.acquire(keys.lease(job_id, chunk))
        except RedisError as exc:
            raise Reject(f"no lease without the broker: {exc}", requeue=True) from exc

    def _encode(self, request: ChunkMessage, lease: Lease) -> JobEvent | None:
        """Encode a chunk -> what the reconciler is told, None if it is not ours any more."""
        job_id, chunk = request.job_id, request.chunk
        watch = _Watch(self, request, lease)
        try:
            failure = self.chunks.store.failure(job_id, chunk)
            # The broker delivers once more what dead workers had: a chunk that kills would go on doing so for ever.
            if failure is not None and failure.gave_up:
                logger.info("chunk %d of job %s has been given up, dropped", chunk, job_id)
                return JobEvent(job_id=job_id, chunk=chunk, what="failed")
            # A chunk that a worker died of takes no other chunk with it, if it does so again.
            with self.turns.take(alone=failure is not None and failure.crashes > 0, waiting=watch.check):
                watch.begin()
                self.chunks.encode(job_id, chunk, watch)
        except LeaseLostError:
            logger.warning("chunk %d of job %s went to another worker: this one was silent too long", chunk, job_id)
            return None
        except (JobNotFoundError, JobCancelledError):
            logger.info("chunk %d of job %s: the job is cancelled, failed or gone, dropped", chunk, job_id)
            return JobEvent(job_id=job_id)
        except (ChunkStoppedError, FingerprintMismatchError):
            raise
        except StorageError as exc:
            logger.warning("chunk %d of job %s waits for the storage: %s", chunk, job_id, exc)
            self.notes.trouble(job_id, str(exc), _TROUBLE_SHOWN_S)
            return JobEvent(job_id=job_id, chunk=chunk, what="stalled")
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is noted
            return self._failed(request, exc)
        logger.info("chunk %d of job %s is done", chunk, job_id)
        return JobEvent(job_id=job_id, chunk=chunk, what="done")

    def _failed(self, request: ChunkMessage, exc: Exception) -> JobEvent:
        """Note why a chunk failed -> what the reconciler is told."""
        job_id, chunk = request.job_id, request.chunk
        # A device that fails ends its worker. If the chunk is to blame, it would go round for ever.
        crashed = isinstance(exc, DeviceLostError)
        if self.stopping.is_set() and not crashed:
            raise HandedBackError(f"the worker is stopping ({type(exc).__name__}: {exc})") from exc
        if isinstance(exc, PromptFailedError):
            logger.warning("chunk %d of job %s ends the job: %s", chunk, job_id, exc)
            return self._note_failure(request, str(exc), crashed=False, limit=1)
        logger.error("chunk %d of job %s failed", chunk, job_id, exc_info=exc)
        limit = self.chunk_crashes if crashed else self.chunk_attempts
        return self._note_failure(request, f"{type(exc).__name__}: {exc}", crashed=crashed, limit=limit)

    def _note_failure(self, request: ChunkMessage, error: str, *, crashed: bool, limit: int) -> JobEvent:
        store, job_id, chunk = self.chunks.store, request.job_id, request.chunk
        try:
            store.note_failure(job_id, chunk, error, crashed=crashed, limit=limit)
        except StorageError as exc:
            self.notes.trouble(job_id, str(exc), _TROUBLE_SHOWN_S)
            return JobEvent(job_id=job_id, chunk=chunk, what="stalled")
        return JobEvent(job_id=job_id, chunk=chunk, what="failed")


class _Watch:
    """Looks after one chunk: tells its progress, and whether to stop."""

    def __init__(self, tasks: Tasks, request: ChunkMessage, lease: Lease) -> None:
        self._tasks = tasks
        self._job_id, self._chunk = request.job_id, request.chunk
        self._lease = lease
        self._told_at = 0.0
        self._looked_at = time.monotonic()

    def begin(self) -> None:
        """Tell that work has begun, so that the reconciler knows if its worker dies."""
        self._tell(0)

    def progress(self, rows: int) -> None:
        """Tell how many rows are encoded, not too often."""
        if time.monotonic() - self._told_at > _PROGRESS_EVERY_S:
            self._tell(rows)

    def check(self) -> None:
        """Find out whether to go on."""
        if self._tasks.stopping.is_set():
            raise HandedBackError("the worker is stopping")
        if self._lease.lost:
            raise LeaseLostError
        if time.monotonic() - self._looked_at > _LOOK_AT_FILES_EVERY_S:
            self._looked_at = time.monotonic()
            if self._tasks.chunks.store.is_stopped(self._job_id):
                raise JobCancelledError

    def _tell(self, rows: int) -> None:
        self._told_at = time.monotonic()
        found = self._tasks.notes.progress(self._job_id, self._chunk, rows)
        if not found.is_leased:  # Redis was emptied, or away for long: who looks now would take this worker for dead
            self._tasks.leases.renew(self._lease)
        if found.is_stopped and self._tasks.chunks.store.is_stopped(self._job_id):
            raise JobCancelledError
