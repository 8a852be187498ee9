"""What the API knows of the encoders that workers have loaded: their announcements in Redis."""

from __future__ import annotations

from typing import cast

from redis.asyncio import Redis

from api.problems import Unavailable
from jobs import keys
from jobs.records import EncoderInfo, WorkerPresence
from jobs.tensors import Array, load_tensors

ConstantRows = tuple[Array, Array]
"""Prefix rows `[P, D]` and pad row `[D]`."""


class LiveEncoders:
    """Reads who is there. Constant rows are fetched once a fingerprint.

    `redis` must be a connection that does not decode answers.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._constants: dict[str, ConstantRows] = {}

    async def workers(self) -> list[WorkerPresence]:
        """Return the workers that have loaded an encoder, at least one, the longest-running first.

        Raises:
            Unavailable: there is none.
            RedisError: the broker does not answer.
        """
        ids = sorted(name.decode() for name in cast("set[bytes]", await self._redis.smembers(keys.WORKER_IDS)))
        found = await self._redis.mget([keys.worker(worker_id) for worker_id in ids]) if ids else []
        if gone := [worker_id for worker_id, value in zip(ids, found, strict=True) if value is None]:
            await self._redis.srem(keys.WORKER_IDS, *gone)
        if len(gone) == len(ids):
            raise Unavailable("no-worker", "no worker has loaded its encoder yet")
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
            self._constants[fingerprint] = tensors["prefix_rows"], tensors["pad_row"]
        return self._constants[fingerprint]
