"""How many calls each key may make, counted in Redis for all API processes of a broker."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from limits import RateLimitItem, parse_many
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.asyncio import Redis
from redis.exceptions import RedisError
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.access import reads_openly
from api.problems import Problem, respond
from jobs import keys
from jobs.errors import SettingsError

logger = logging.getLogger(__name__)
_BROKER_TIMEOUT_S = 1.0
_EVERYBODY = ""  # no key has this name


def parse_limits(text: str | None) -> list[RateLimitItem]:
    """Read limits such as `20/second;600/minute`.

    Raises:
        SettingsError: it is none; the message names the variable and the value.
    """
    try:
        found = parse_many(text) if text else []
    except ValueError as exc:
        raise _bad(text) from exc
    if any(item.amount < 1 for item in found):
        raise _bad(text)
    # The shortest window first: a call that it refuses is not counted in the others.
    return sorted(found, key=lambda item: item.get_expiry())


def _bad(text: str | None) -> SettingsError:
    return SettingsError(
        f"LAYERSTACK_RATE_LIMIT={text!r}: must be a number from 1 on per second, minute, hour or day, such as "
        "600/minute; of several with ; between"
    )


class RateLimits:
    """The counters of all keys.

    Args:
        redis: the broker.
        items: the limits, each of which holds for each key.
    """

    def __init__(self, redis: Redis, items: list[RateLimitItem]) -> None:
        self._items = items
        pool: Any = redis.connection_pool  # options of the storage are annotated as numbers and strings
        storage = RedisStorage(
            "async+redis://",  # the pool knows where the broker is
            implementation="redispy",
            key_prefix=keys.RATE_LIMIT,
            connection_pool=pool,
        )
        self._limiter = SlidingWindowCounterRateLimiter(storage)

    async def count(self, name: str | None) -> Mapping[str, str]:
        """Count a call of a key; returns headers that tell how many more there may be.

        Raises:
            Problem: 429, it is one too many.
            RedisError, TimeoutError: the broker does not answer.
        """
        who = name or _EVERYBODY
        async with asyncio.timeout(_BROKER_TIMEOUT_S):
            for item in self._items:
                if not await self._limiter.hit(item, who):
                    raise _too_many(item, *await self._left(item, who))
            left = [(*await self._left(item, who), item) for item in self._items]
        remaining, reset_s, item = min(left, key=lambda each: each[0])
        return _headers(item, remaining, reset_s)

    async def _left(self, item: RateLimitItem, who: str) -> tuple[int, int]:
        """Return how many calls are left, and in how many seconds there is one more."""
        stats = await self._limiter.get_window_stats(item, who)
        return stats.remaining, max(1, math.ceil(stats.reset_time - time.time()))


def _headers(item: RateLimitItem, remaining: int, reset_s: int) -> dict[str, str]:
    return {"RateLimit-Limit": str(item.amount), "RateLimit-Remaining": str(remaining), "RateLimit-Reset": str(reset_s)}


def _too_many(item: RateLimitItem, remaining: int, reset_s: int) -> Problem:
    return Problem(
        "rate-limited",
        f"more calls than {item}; try again in {reset_s} s",
        headers={"Retry-After": str(reset_s), **_headers(item, remaining, reset_s)},
        limit=item.amount,
        window_s=item.get_expiry(),
    )


class RateLimit:
    """ASGI middleware: counts calls, and answers with 429 what is too much, before its body is read.

    While the broker is away nothing is counted: a call that needs it says so itself. Behind `KeyCheck`, which tells
    whose call it is.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count a call."""
        if scope["type"] != "http" or reads_openly(scope):
            await self.app(scope, receive, send)
            return
        limits: RateLimits = scope["app"].state.rate_limits
        headers: Mapping[str, str] = {}
        try:
            headers = await limits.count(scope["state"]["owner"])
        except Problem as problem:
            await respond(problem)(scope, receive, send)
            return
        except (RedisError, TimeoutError) as exc:
            logger.warning("a call is not counted, the broker does not answer: %s", exc or type(exc).__name__)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
            await send(message)

        await self.app(scope, receive, with_headers)
