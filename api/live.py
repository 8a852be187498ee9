"""What Redis tells of jobs, and is told of them. A courtesy in both directions: the files tell the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from pydantic_core import from_json
from redis.asyncio import Redis
from redis.exceptions import RedisError

from jobs import keys
from jobs.messages import JobEvent
from jobs.progress import NOTHING_LIVE, Live


async def live_jobs(redis: Redis, job_ids: Sequence[str]) -> list[Live]:
    """Ask the broker once how far jobs have got; one that hangs costs its timeout once, not for each job.

    Returns:
        For each id what is known of it: `NOTHING_LIVE`, the very object, if the broker does not answer.
    """
    try:
        async with redis.pipeline(transaction=False) as asked:
            asked.get(keys.QUEUE)
            for job_id in job_ids:
                asked.hgetall(keys.progress(job_id))
                asked.get(keys.trouble(job_id))
            queue, *answers = await asked.execute()
    except RedisError:
        return [NOTHING_LIVE] * len(job_ids)
    positions = _positions(queue)
    return [
        Live(
            rows={int(chunk): int(rows) for chunk, rows in found.items()},
            trouble=trouble.decode() if trouble else None,
            queue_position=positions.get(job_id),
        )
        for job_id, found, trouble in zip(job_ids, answers[::2], answers[1::2], strict=True)
    ]


def _positions(queue: bytes | None) -> Mapping[str, int]:
    """Return how many unfinished jobs are before each."""
    return {job_id: position for position, job_id in enumerate(from_json(queue) if queue else [])}


async def tell_changed(redis: Redis, job_id: str) -> None:
    """Tell the reconciler that a job has changed; without that, it sees so when it next looks at the files."""
    with suppress(RedisError):
        await redis.rpush(keys.EVENTS, JobEvent(job_id=job_id).model_dump_json())
        await redis.expire(keys.EVENTS, keys.EVENTS_TTL_S)


async def tell_cancelled(redis: Redis, job_id: str, *, cancelled: bool) -> None:
    """Tell workers at once whether a job is to be stopped; what counts is the mark in the storage, seen later."""
    with suppress(RedisError):
        if cancelled:
            await redis.set(keys.cancelled(job_id), 1, ex=keys.CANCELLED_TTL_S)
        else:  # it would expire; until then workers would put the job's chunks down
            await redis.delete(keys.cancelled(job_id))
