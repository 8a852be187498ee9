"""What the API knows of the encoders that workers have loaded: their announcements in Redis."""

from __future__ import annotations

import asyncio
import time
from typing import cast

from redis.asyncio import Redis
from redis.exceptions import ConnectionError, RedisError  # noqa: A004 - redis has one of its own

from api.prediction import ConstantRows
from api.problems import Unavailable
from jobs import keys
from jobs.records import EncoderInfo, WorkerPresence
from jobs.tensors import load_tensors

# Every /predict asks, before it begins and while it waits; workers come and go much more seldom.
_KNOWN_FOR_S = 0.25


class LiveEncoders:
    """Reads who is there, at most four times a second. Constant rows are fetched once a fingerprint.

    `redis` must be a connection that does not decode answers.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._constants: dict[str, ConstantRows] = {}
        self._known: list[WorkerPresence] = []
        self._known_until = 0.0
        self._asking = asyncio.Lock()
        self._failure = ""
        self._failed_at = 0.0

    async def workers(self) -> list[WorkerPresence]:
        """Return the workers that have loaded an encoder, at least one, the longest-running first.

        Raises:
            Unavailable: there is none.
            RedisError: the broker does not answer.
        """
        came_at = time.monotonic()
        async with self._asking:
            # A broker that hangs makes one caller wait for a timeout, not each after the one before.
            if self._failed_at >= came_at:
                raise ConnectionError(self._failure)
            if time.monotonic() > self._known_until:
                await self._renew()
        if not self._known:
            raise Unavailable("no-worker", "no worker has loaded its encoder yet")
        return self._known

    async def _renew(self) -> None:
        try:
            self._known = await self._ask()
        except RedisError as exc:
            self._failure, self._failed_at = str(exc), time.monotonic()
            raise
        # Whoever starts a worker waits for it: that there is none is asked again each time.
        self._known_until = time.monotonic() + (_KNOWN_FOR_S if self._known else 0.0)

    async def _ask(self) -> list[WorkerPresence]:
        ids = sorted(name.decode() for name in cast("set[bytes]", await self._redis.smembers(keys.WORKER_IDS)))
        found = await self._redis.mget([keys.worker(worker_id) for worker_id in ids]) if ids else []
        if gone := [worker_id for worker_id, value in zip(ids, found, strict=True) if value is None]:
            await self._redis.srem(keys.WORKER_IDS, *gone)
        return [WorkerPresence.model_validate_json(value) for value in found if value is not None]

    async def current(self) -> EncoderInfo:
        """Return the encoder that new work is for: that of the worker which started last.

        Raises:
            Unavailable: no worker has loaded one.
            RedisError: the broker does not answer.
        """
        return (await self.workers())[-1].encoder

    async def constant_rows(self, fingerprint: str) -> ConstantRows:
        """Return the constant rows of the encoder `fingerprint`.

        Raises:
            Unavailable: its last worker has gone.
            RedisError: the broker does not answer.
        """
        if fingerprint not in self._constants:
            content = cast("bytes | None", await self._redis.get(keys.encoder(fingerprint)))
            if content is None:
                raise Unavailable("no-worker", f"the workers of the encoder {fingerprint} have gone")
            tensors, _ = load_tensors(content)
            self._constants[fingerprint] = ConstantRows(tensors["prefix_rows"], tensors["pad_row"])
        return self._constants[fingerprint]
