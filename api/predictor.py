"""Sends a few prompts to a worker and waits for the reply."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

from anyio import CapacityLimiter, to_thread
from celery import Celery
from kombu.exceptions import OperationalError
from redis.asyncio import Redis
from redis.exceptions import RedisError
from ulid import ULID

from api.admission import Admission
from api.encoders import LiveEncoders
from api.prediction import Prediction
from api.problems import Problem, invalid
from jobs import keys
from jobs.messages import PredictFailure, PredictMessage, PredictReply, unpack_reply
from jobs.queue import publish_predict

logger = logging.getLogger(__name__)
# Whoever waits looks this often whether there is still a worker; with 64 who wait, each look less is felt.
_LOOK_EVERY_S = 0.5
# Publishing takes a millisecond; it must not wait for the threads that uploads hold for minutes.
_PUBLISHERS = 8
_PUBLISH_WITHIN_S = 5.0
# A broker that hangs has made the client wait already; what it was sent, it does when it goes on.
_WITHDRAW_WITHIN_S = 1.0


class Predictor:
    """Puts requests on the interactive queue and takes their replies."""

    def __init__(
        self,
        *,
        celery: Celery,
        redis: Redis,
        reply_redis: Redis,
        encoders: LiveEncoders,
        admission: Admission,
        timeout_s: float,
    ) -> None:
        self._celery = celery
        self._redis = redis
        self._reply_redis = reply_redis
        self._encoders = encoders
        self._admission = admission
        self._timeout_s = timeout_s
        self._publishers = CapacityLimiter(_PUBLISHERS)

    async def predict(self, prompts: list[str]) -> Prediction:
        """Return the embeddings of `prompts`. Cancelling this tells the workers, who drop what has not begun.

        Raises:
            Unavailable: no worker is there, or the last one has gone meanwhile.
            Problem: 429 if too many requests wait, 422 for a prompt that cannot be encoded, 504 without an answer in
                time, 500 if the encoder failed.
            RedisError, kombu.exceptions.OperationalError: the broker does not answer.
        """
        started = time.perf_counter()
        await self._encoders.current()  # without a worker there is no point in waiting
        request = PredictMessage(request_id=str(ULID()), prompts=prompts, deadline=time.time() + self._timeout_s)
        async with self._admission.place(request.request_id) as place, self._withdrawn_unless_answered(request):
            await self._publish(request)
            reply = unpack_reply(await self._reply(request))
            place.answered = True
        if isinstance(reply, PredictFailure):
            raise _failure(reply, prompts)
        waited_ms = (time.perf_counter() - started) * 1e3
        return await self._prediction(reply, queue_ms=max(0.0, waited_ms - reply.encode_ms))

    async def _publish(self, request: PredictMessage) -> None:
        try:
            async with asyncio.timeout(_PUBLISH_WITHIN_S):
                await to_thread.run_sync(
                    publish_predict, self._celery, request, limiter=self._publishers, abandon_on_cancel=True
                )
        except TimeoutError as exc:
            raise OperationalError(f"not published within {_PUBLISH_WITHIN_S:g} s") from exc

    async def _reply(self, request: PredictMessage) -> bytes:
        """Wait for the reply for as long as there are workers and time is left."""
        while (left_s := request.deadline - time.time()) > 0:
            wait_s = max(0.01, min(_LOOK_EVERY_S, left_s))
            answer = await self._reply_redis.blpop([keys.reply(request.request_id)], timeout=wait_s)
            if answer is not None:
                return cast("bytes", answer[1])
            await self._encoders.current()
        raise Problem("no-answer", f"no worker answered within {self._timeout_s:g} s", limit=self._timeout_s)

    @asynccontextmanager
    async def _withdrawn_unless_answered(self, request: PredictMessage) -> AsyncIterator[None]:
        """Tell the workers if the block ends without an answer, also because the client has gone."""
        try:
            yield
        except (Exception, asyncio.CancelledError):
            request_id = request.request_id
            try:
                async with asyncio.timeout(_WITHDRAW_WITHIN_S), self._redis.pipeline(transaction=False) as pipe:
                    # The mark is for workers that have not begun the request, the message for the one that has. None
                    # begins it after its deadline.
                    pipe.set(keys.withdrawn(request_id), 1, ex=math.ceil(self._timeout_s) + 1)
                    pipe.publish(keys.WITHDRAWN, request_id)
                    await pipe.execute()
            except (RedisError, TimeoutError) as exc:
                logger.warning("request %s cannot be withdrawn: %r", request_id, exc)
            raise

    async def _prediction(self, reply: PredictReply, queue_ms: float) -> Prediction:
        return Prediction(
            own_rows=reply.own_rows,
            constants=await self._encoders.constant_rows(reply.fingerprint),
            max_length=reply.max_length,
            num_tokens=reply.num_tokens,
            truncated=reply.truncated,
            fingerprint=reply.fingerprint,
            encode_ms=reply.encode_ms,
            queue_ms=queue_ms,
        )


def _failure(failure: PredictFailure, prompts: list[str]) -> Problem:
    if failure.position is None:
        return Problem("encoder-failed", failure.reason)
    return invalid(f"prompt.{failure.position}", prompts[failure.position], failure.reason)
