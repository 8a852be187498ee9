"""What is in the queue of chunks, and what a worker takes from it."""

import json

from jobs.queue import BULK
from tests.support import wait_for


def named(message):
    """Job and chunk of a message."""
    job_id, _, chunk = json.loads(message)["headers"]["id"].partition("/")
    return job_id, int(chunk)


def waiting(redis, record):
    """Chunks of a job in the queue, one that is there twice as well."""
    found = (named(message) for message in redis.lrange(BULK, 0, -1))
    return sorted(chunk for job_id, chunk in found if job_id == record.id)


def wait_for_chunks(redis, record, chunks):
    wait_for(lambda: waiting(redis, record) == list(chunks))


def take(redis):
    """Take a message as a worker does, but for its lease -> job and chunk."""
    return named(redis.brpop([BULK], timeout=60)[1])


def take_all(redis):
    return sorted(take(redis)[1] for _ in range(redis.llen(BULK)))
