"""What a worker tells of its jobs in Redis. All of it is a courtesy: no job depends on it, and no fault ends one."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from redis import Redis, RedisError

from jobs import keys
from jobs.messages import JobEvent
from jobs.records import JobStatus

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """What Redis says of a chunk that is being worked on.

    Attributes:
        is_leased: whether anybody holds its lease.
        is_stopped: whether somebody told that its job is cancelled, or has failed.
    """

    is_leased: bool
    is_stopped: bool


class JobNotes:
    """Progress, events and troubles of jobs."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def progress(self, job_id: str, chunk: int, rows: int) -> Progress:
        """Tell how many rows of a chunk are encoded -> what Redis says of the chunk meanwhile."""
        key = keys.progress(job_id)
        answers: list[Any] = [True, False]
        with _courtesy("tell the progress"), self._redis.pipeline() as pipe:
            pipe.hset(key, str(chunk), str(rows))
            pipe.expire(key, keys.PROGRESS_TTL_S)
            pipe.exists(keys.lease(job_id, chunk))
            pipe.exists(keys.cancelled(job_id))
            answers = pipe.execute()
        return Progress(is_leased=bool(answers[-2]), is_stopped=bool(answers[-1]))

    def put_down(self, job_id: str, chunk: int) -> None:
        """Tell that nobody works on a chunk any more."""
        with _courtesy("take back the progress"):
            self._redis.hdel(keys.progress(job_id), str(chunk))

    def tell(self, event: JobEvent) -> None:
        """Tell the reconciler what has happened."""
        with _courtesy("tell the reconciler"), self._redis.pipeline() as pipe:
            pipe.rpush(keys.EVENTS, event.model_dump_json())
            pipe.ltrim(keys.EVENTS, -keys.MAX_EVENTS, -1)
            pipe.expire(keys.EVENTS, keys.EVENTS_TTL_S)
            pipe.execute()

    def trouble(self, job_id: str, reason: str, seconds: float) -> None:
        """Tell why a job waits, for so many seconds."""
        with _courtesy("tell of a trouble"):
            self._redis.set(keys.trouble(job_id), reason, ex=max(1, round(seconds)))

    def no_trouble(self, job_id: str) -> None:
        """Tell that a job does not wait any more."""
        with _courtesy("take back a trouble"):
            self._redis.delete(keys.trouble(job_id))

    def stopped(self, job_id: str) -> None:
        """Tell that no chunk of a job is to go on."""
        with _courtesy("tell that a job has stopped"):
            self._redis.set(keys.cancelled(job_id), 1, ex=keys.CANCELLED_TTL_S)

    def overview(self, queue: Sequence[str], counts: Mapping[JobStatus, int], seconds: float) -> None:
        """Tell for so many seconds which jobs are unfinished, oldest first, and how many there are of each status."""
        shown = json.dumps(queue[: keys.MAX_QUEUE])
        with _courtesy("tell which jobs there are"), self._redis.pipeline() as pipe:
            pipe.set(keys.QUEUE, shown, ex=max(1, round(seconds)))
            pipe.delete(keys.JOB_COUNTS)
            pipe.hset(keys.JOB_COUNTS, mapping={status.value: counts.get(status, 0) for status in JobStatus})
            pipe.expire(keys.JOB_COUNTS, max(1, round(seconds)))
            pipe.execute()

    def troubled(self, job_ids: Sequence[str]) -> set[str]:
        """Return those of the jobs that wait for something.

        Raises:
            RedisError: Redis does not answer.
        """
        found = self._redis.mget([keys.trouble(job_id) for job_id in job_ids]) if job_ids else []
        told = cast("list[bytes | None]", found)
        return {job_id for job_id, reason in zip(job_ids, told, strict=True) if reason is not None}

    def begun(self, job_id: str) -> set[int]:
        """Return the chunks that have been begun and not put down; some of their workers may have died.

        Raises:
            RedisError: Redis does not answer.
        """
        return {int(chunk) for chunk in cast("list[bytes]", self._redis.hkeys(keys.progress(job_id)))}


@contextmanager
def _courtesy(what: str) -> Iterator[None]:
    try:
        yield
    except RedisError as exc:
        logger.warning("cannot %s: %s", what, exc)
