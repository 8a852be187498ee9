"""Tells the API that this worker is there, which encoder it has loaded, and what it has counted."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Self

from redis import Redis, RedisError
from ulid import ULID

from encoder import Encoder
from jobs import keys
from jobs.records import WorkerCounters, WorkerPresence
from jobs.tensors import save_tensors
from worker.rows import describe, to_numpy

logger = logging.getLogger(__name__)


class Presence:
    """Renews this worker's keys in Redis from a thread, as a context manager; takes them back at the end."""

    def __init__(self, redis: Redis, encoder: Encoder, counters: Callable[[], WorkerCounters]) -> None:
        self._redis = redis
        self._counters = counters
        self._fingerprint = encoder.fingerprint
        self._constants = save_tensors(
            {"prefix_rows": to_numpy(encoder.prefix_rows), "pad_row": to_numpy(encoder.pad_row)}
        )
        self._presence = WorkerPresence(
            worker_id=str(ULID()), host=socket.gethostname(), started_at=datetime.now(UTC), encoder=describe(encoder)
        )
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="presence", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def now(self) -> WorkerPresence:
        """Return what this worker is, and has counted by now."""
        return self._presence.model_copy(update={"counters": self._counters()})

    def __exit__(self, *_exc: object) -> None:
        self._leaving.set()
        self._thread.join()
        try:
            self._redis.delete(keys.worker(self._presence.worker_id))
            self._redis.srem(keys.WORKER_IDS, self._presence.worker_id)
        except RedisError as exc:
            logger.warning("cannot sign off, the keys expire by themselves: %s", exc)

    def _renew(self) -> None:
        while not self._leaving.is_set():
            try:
                self._announce()
            except RedisError as exc:
                logger.warning("cannot announce this worker, will try again: %s", exc)
            self._leaving.wait(keys.WORKER_TTL_S / 5)

    def _announce(self) -> None:
        constants_key = keys.encoder(self._fingerprint)
        # Megabytes for the real model, and always the same: sent only when they are gone.
        if not self._redis.expire(constants_key, keys.WORKER_TTL_S * 4):
            self._redis.set(constants_key, self._constants, ex=keys.WORKER_TTL_S * 4)
        worker_id = self._presence.worker_id
        self._redis.set(keys.worker(worker_id), self.now().model_dump_json(), ex=keys.WORKER_TTL_S)
        self._redis.sadd(keys.WORKER_IDS, worker_id)
