"""What is in the queue of chunks, what a worker takes from it, and what it does and tells."""

import json

from jobs.messages import JobEvent
from jobs.queue import BULK
from tests.sample_jobs import do_chunk, make_job
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


def done(store, notes, record, chunk):
    """Do a chunk, and tell so."""
    do_chunk(store, record, chunk)
    notes.tell(JobEvent(job_id=record.id, chunk=chunk, what="done"))


def status(store, record):
    return store.files(record.id).status()


def wait_for_a_search(redis, store, notes):
    """Wait until the reconciler has looked for lost chunks, by one that it has to find."""
    probe = make_job(store, count=1)
    notes.tell(JobEvent(job_id=probe.id))
    wait_for_chunks(redis, probe, [0])
    redis.lrem(BULK, 1, next(message for message in redis.lrange(BULK, 0, -1) if probe.id.encode() in message))
    wait_for_chunks(redis, probe, [0])
    store.delete(probe.id)
