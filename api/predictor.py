"""Sends a few prompts to a worker and waits for the reply."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import cast

import numpy as np
from celery import Celery
from redis.asyncio import Redis
from starlette.concurrency import run_in_threadpool
from ulid import ULID

from api.encoders import LiveEncoders
from api.problems import Problem, invalid
from jobs import keys
from jobs.messages import PredictFailure, PredictMessage, PredictReply, unpack_reply
from jobs.queue import publish_predict
from jobs.tensors import Array, dense_rows, text_ids


@dataclass(frozen=True, eq=False)
class Prediction:
    """The dense tensors of a request.

    Attributes:
        prompt_embeds: `[B, L, D]`.
        text_ids: `[B, L, 4]`, int64.
        num_tokens: `[B]`, prefix included.
        truncated: `[B]`.
        fingerprint: of the encoder.
        encode_ms: milliseconds that the encoder took.
    """

    prompt_embeds: Array
    text_ids: Array
    num_tokens: Array
    truncated: Array
    fingerprint: str
    encode_ms: float


class Predictor:
    """Puts requests on the interactive queue and makes their replies dense."""

    def __init__(self, celery: Celery, reply_redis: Redis, encoders: LiveEncoders, timeout_s: float) -> None:
        self._celery = celery
        self._reply_redis = reply_redis
        self._encoders = encoders
        self._timeout_s = timeout_s

    async def predict(self, prompts: list[str]) -> Prediction:
        """Return the embeddings of `prompts`.

        Raises:
            Unavailable: no worker is there.
            Problem: 422 for a prompt that cannot be encoded, 504 without an answer in time, 500 if the encoder failed.
            RedisError, kombu.exceptions.OperationalError: the broker does not answer.
        """
        await self._encoders.current()  # without a worker there is no point in waiting
        request = PredictMessage(request_id=str(ULID()), prompts=prompts, deadline=time.time() + self._timeout_s)
        await run_in_threadpool(publish_predict, self._celery, request)
        answer = await self._reply_redis.blpop(keys.reply(request.request_id), timeout=self._timeout_s)
        if answer is None:
            raise Problem(504, "no-answer", f"no worker answered within {self._timeout_s:g} s", limit=self._timeout_s)
        reply = unpack_reply(cast("bytes", answer[1]))
        if isinstance(reply, PredictFailure):
            raise _failure(reply, prompts)
        prefix_rows, pad_row = await self._encoders.constant_rows(reply.fingerprint)
        return await run_in_threadpool(_dense, reply, prefix_rows, pad_row)


def _dense(reply: PredictReply, prefix_rows: Array, pad_row: Array) -> Prediction:
    batch, max_length = len(reply.own_rows), reply.max_length
    return Prediction(
        prompt_embeds=np.stack(
            [
                dense_rows(rows, prefix_rows=prefix_rows, pad_row=pad_row, max_length=max_length)
                for rows in reply.own_rows
            ]
        ),
        text_ids=np.broadcast_to(text_ids(0, max_length), (batch, max_length, 4)),
        num_tokens=reply.num_tokens,
        truncated=reply.truncated,
        fingerprint=reply.fingerprint,
        encode_ms=reply.encode_ms,
    )


def _failure(failure: PredictFailure, prompts: list[str]) -> Problem:
    if failure.position is None:
        return Problem(500, "encoder-failed", failure.reason)
    return invalid(f"prompt.{failure.position}", prompts[failure.position], failure.reason)
