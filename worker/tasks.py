"""The Celery tasks: read the message, call one plain function, map its errors to an answer for the queue."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from celery import Celery, Task
from celery.exceptions import Reject
from pydantic import ValidationError
from redis import Redis, RedisError

from encoder import DeadlineExceededError, Engine
from jobs import keys
from jobs.errors import JobNotFoundError
from jobs.messages import ChunkMessage, PredictFailure, PredictMessage, pack_reply
from jobs.queue import CHUNK_TASK, PREDICT_TASK
from jobs.store import JobStore
from worker.chunks import encode_chunk
from worker.errors import HandedBackError
from worker.predict import answer

logger = logging.getLogger(__name__)
# A storage that cannot even note a failure is asked again no faster than this.
_STORAGE_PAUSE_S = 5.0
# After the first failed attempt; longer after each, so that a short fault does not use up all of them.
_ATTEMPT_PAUSE_S = 1.0


class Tasks:
    """The tasks of one worker process, with what they need."""

    def __init__(
        self,
        *,
        engine: Engine,
        store: JobStore,
        redis: Redis,
        reply_redis: Redis,
        chunk_attempts: int,
        stopping: threading.Event,
    ) -> None:
        self._engine = engine
        self._store = store
        self._redis = redis
        self._reply_redis = reply_redis
        self._chunk_attempts = chunk_attempts
        self._stopping = stopping

    def register(self, app: Celery) -> None:
        """Make the tasks known to `app`."""

        def predict(message: dict[str, Any]) -> None:
            self.predict(message)

        def chunk(task: Task[..., None], message: dict[str, Any]) -> None:
            self.chunk(message, (task.request.properties or {}).get("delivery_tag"))

        # Not shared: the other app of this process registers its own.
        app.task(name=PREDICT_TASK, shared=False)(predict)
        app.task(name=CHUNK_TASK, shared=False, bind=True)(chunk)

    def predict(self, message: dict[str, Any]) -> None:
        """Answer a request, unless nobody waits for the answer any more."""
        try:
            request = PredictMessage.model_validate(message)
        except ValidationError as exc:
            logger.error("a predict message that cannot be read is dropped: %d errors", exc.error_count())  # noqa: TRY400 - prompts stay out of logs
            return
        if time.time() > request.deadline:
            logger.info("request %s: its deadline has passed, dropped", request.request_id)
            return
        try:
            reply = pack_reply(answer(self._engine, request))
        except DeadlineExceededError as exc:
            logger.info("request %s: %s, dropped", request.request_id, exc)
            return
        except Exception:  # whatever it is, the client is told rather than left waiting
            logger.exception("request %s failed", request.request_id)
            reply = pack_reply(PredictFailure(position=None, reason="the encoder failed; the worker's log says why"))
        key = keys.reply(request.request_id)
        with self._reply_redis.pipeline() as pipe:
            pipe.rpush(key, reply)
            pipe.expire(key, keys.REPLY_TTL_S)
            pipe.execute()

    def chunk(self, message: dict[str, Any], delivery_tag: str | None = None) -> None:
        """Encode a chunk; a failure is noted in the job, and tried again while attempts are left.

        Args:
            message: a `ChunkMessage` as JSON.
            delivery_tag: what kombu calls this delivery, which is kept from being delivered again meanwhile.

        Raises:
            Reject: the message goes back to the queue, because the worker is stopping, an attempt failed and another
                is left, or the storage cannot even note a failure.
        """
        try:
            request = ChunkMessage.model_validate(message)
        except ValidationError:
            logger.exception("a chunk message that cannot be read is dropped: %r", message)
            return
        job_id, chunk = request.job_id, request.chunk
        try:
            encode_chunk(
                self._store,
                self._engine,
                job_id,
                chunk,
                stopping=self._stopping.is_set,
                on_progress=lambda rows: self._note_progress(request, rows, delivery_tag),
            )
        except JobNotFoundError:
            logger.info("chunk %d of job %s: the job is gone, dropped", chunk, job_id)
        except HandedBackError as exc:
            logger.info("handed back: %s", exc)
            self._forget_progress(job_id, chunk)
            raise Reject(str(exc), requeue=True) from exc
        except Exception as exc:
            logger.exception("chunk %d of job %s failed", chunk, job_id)
            self._forget_progress(job_id, chunk)
            self._note_failure(request, f"{type(exc).__name__}: {exc}")
        else:
            logger.info("chunk %d of job %s is done", chunk, job_id)

    def _note_failure(self, request: ChunkMessage, error: str) -> None:
        try:
            failure = self._store.record_failure(request.job_id, request.chunk, error, self._chunk_attempts)
        except JobNotFoundError:
            return
        except OSError as exc:
            self._stopping.wait(_STORAGE_PAUSE_S)
            raise Reject(f"the storage cannot note a failure: {exc}", requeue=True) from exc
        if not failure.gave_up:
            self._stopping.wait(failure.attempts * _ATTEMPT_PAUSE_S)
            raise Reject(f"attempt {failure.attempts} failed", requeue=True)

    def _note_progress(self, request: ChunkMessage, rows: int, delivery_tag: str | None) -> None:
        """Tell whoever watches, and the broker that the chunk is alive; a chunk does not fail for that."""
        key = keys.progress(request.job_id)
        try:
            with self._redis.pipeline() as pipe:
                pipe.hset(key, str(request.chunk), str(rows))
                pipe.expire(key, keys.PROGRESS_TTL_S)
                if delivery_tag is not None:
                    pipe.zadd(keys.KOMBU_UNACKED_INDEX, {delivery_tag: time.time()}, xx=True)
                pipe.execute()
        except RedisError as exc:
            logger.warning("cannot note the progress of job %s: %s", request.job_id, exc)

    def _forget_progress(self, job_id: str, chunk: int) -> None:
        """Take back what was told of rows that are thrown away."""
        try:
            self._redis.hdel(keys.progress(job_id), str(chunk))
        except RedisError as exc:
            logger.warning("cannot take back the progress of job %s: %s", job_id, exc)
