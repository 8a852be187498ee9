"""Chunks that a worker's task works on, and what they leave in Redis."""

import threading

from celery.exceptions import Reject

from jobs import keys
from jobs.messages import JobEvent
from tests.support import wait_for

S = 60  # after which a chunk that is still under way is a failure


def run(tasks, record, chunk=0):
    tasks.chunk({"job_id": record.id, "chunk": chunk})


def events(redis):
    told = [JobEvent.model_validate_json(content) for content in redis.lrange(keys.EVENTS, 0, -1)]
    return [(event.chunk, event.what) for event in told]


def at_rest(redis, record, chunk=0):
    """Whether nobody seems to work on a chunk any more."""
    return not (redis.exists(keys.lease(record.id, chunk)) or redis.hexists(keys.progress(record.id), str(chunk)))


class Running:
    """A chunk that a thread works on, held on the device."""

    def __init__(self, tasks, record, chunk=0):
        self.error = None
        self._thread = threading.Thread(target=self._run, args=(tasks, record, chunk))
        self._thread.start()

    def _run(self, tasks, record, chunk):
        try:
            run(tasks, record, chunk)
        except Reject as exc:
            self.error = exc

    def join(self):
        self._thread.join(S)
        assert not self._thread.is_alive()


def begin(tasks, redis, record, chunk=0):
    running = Running(tasks, record, chunk)
    wait_for(lambda: redis.hexists(keys.progress(record.id), str(chunk)))
    return running
