"""How many /predict requests may wait at the same time, counted in Redis for all API processes of a broker."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from api.problems import Problem
from jobs import keys

logger = logging.getLogger(__name__)
_LONGEST_WAIT_S = 60
_TIMED_ANSWERS = 64
# A broker that hangs has made the request wait already; what it was sent, it does when it goes on.
_LEAVE_WITHIN_S = 1.0
# A request leaves the set by itself once its deadline has passed, should its API process die.
_ENTER = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
for place = 4, #ARGV do redis.call('ZREM', KEYS[1], ARGV[place]) end
local waiting = redis.call('ZCARD', KEYS[1])
if waiting == 0 then redis.call('DEL', KEYS[2]) end -- idle times would count as slow ones
if waiting < tonumber(ARGV[2]) then
    redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[1])
    redis.call('EXPIRE', KEYS[1], math.ceil(ARGV[3]) + 1)
    return {1, waiting}
end
local first = redis.call('LINDEX', KEYS[2], -1)
return {0, waiting, redis.call('LLEN', KEYS[2]), first and tostring(now - first) or ''}
"""
_LEAVE = """
redis.call('ZREM', KEYS[1], ARGV[1])
if ARGV[2] == '1' then
    local time = redis.call('TIME')
    redis.call('LPUSH', KEYS[2], tostring(time[1] + time[2] / 1e6))
    redis.call('LTRIM', KEYS[2], 0, ARGV[3] - 1)
    redis.call('EXPIRE', KEYS[2], 600)
end
"""


@dataclass
class Place:
    """The place of one request among those that wait; `answered` is set once its answer is there."""

    answered: bool = False


class Admission:
    """Lets so many requests wait, and tells the others when to come again: as soon as those will have been answered.

    Args:
        redis: the broker.
        limit: requests that may wait.
        timeout_s: seconds that one may wait.
    """

    def __init__(self, redis: Redis, limit: int, timeout_s: float) -> None:
        self._limit = limit
        self._timeout_s = timeout_s
        self._kept: set[str] = set()  # places that could not be given up, while the broker hung
        self._enter: Any = redis.register_script(_ENTER)  # its stubs take the asynchronous client's for a value
        self._leave: Any = redis.register_script(_LEAVE)

    @asynccontextmanager
    async def place(self, request_id: str) -> AsyncIterator[Place]:
        """Hold a place for the block.

        Raises:
            Problem: 429, there is none; `Retry-After` follows from how fast the last requests were answered.
            RedisError: the broker does not answer.
        """
        names = [keys.PREDICT_WAITING, keys.PREDICT_ANSWERED]
        place = Place()
        entered = True  # unless the broker says no: without its answer, it may have given the place all the same
        try:
            kept = list(self._kept)
            args = [request_id, self._limit, self._timeout_s, *kept]
            entered, waiting, *rate = await self._enter(keys=names, args=args)
            self._kept.difference_update(kept)
            if not entered:
                raise _full(waiting, self._limit, _retry_after(waiting, *rate))
            yield place
        except RedisError:
            # Asked once more, a broker that hangs would make the client wait longer for its 503.
            self._kept.add(request_id)
            raise
        finally:
            if entered and request_id not in self._kept:
                await self._give_up(names, request_id, place)

    async def _give_up(self, names: list[str], request_id: str, place: Place) -> None:
        try:
            async with asyncio.timeout(_LEAVE_WITHIN_S):
                await self._leave(keys=names, args=[request_id, int(place.answered), _TIMED_ANSWERS])
        except (RedisError, TimeoutError) as exc:
            self._kept.add(request_id)
            logger.warning("a place among the waiting requests is kept until the broker answers: %r", exc)


def _retry_after(waiting: int, num_answered: int, since_first: bytes) -> int:
    """Return in how many seconds `waiting` requests are answered, if the last `num_answered` took `since_first`."""
    if not num_answered:
        return 1
    seconds = waiting * float(since_first) / num_answered
    return max(1, min(_LONGEST_WAIT_S, math.ceil(seconds)))


def _full(waiting: int, limit: int, retry_after_s: int) -> Problem:
    return Problem(
        "queue-full",
        f"{waiting} requests wait for an answer already, the limit is {limit}; POST /jobs takes any number of prompts",
        headers={"Retry-After": str(retry_after_s)},
        limit=limit,
        see="/jobs",
    )
