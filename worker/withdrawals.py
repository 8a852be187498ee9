"""Requests that nobody waits for any more: their prompts are dropped, unless they are on the device already."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Self

from redis import Redis, RedisError

from jobs import keys

logger = logging.getLogger(__name__)
_POLL_S = 0.5
_PAUSE_S = 1.0


class WatchedRequest:
    """A request that a worker has taken.

    Attributes:
        withdrawn: whether nobody waits for it any more.
    """

    def __init__(self) -> None:
        self.withdrawn = False
        self._future: Future[Any] | None = None
        self._lock = threading.Lock()

    def drops(self, future: Future[Any]) -> None:
        """Have `future` cancelled as soon as the request is withdrawn, or at once if it is."""
        with self._lock:
            self._future = future
        if self.withdrawn:
            future.cancel()

    def withdraw(self) -> None:
        """Note that nobody waits any more."""
        self.withdrawn = True
        with self._lock:
            future = self._future
        if future is not None:
            future.cancel()


class Withdrawals:
    """Listens for withdrawn requests in a thread, as a context manager.

    Losing a message, when Redis is away, costs device time that nobody needs, and nothing else.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._watched: dict[str, WatchedRequest] = {}
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="withdrawals", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._leaving.set()
        self._thread.join()

    @contextmanager
    def watched(self, request_id: str) -> Iterator[WatchedRequest]:
        """Watch a request for the block."""
        request = self._watched[request_id] = WatchedRequest()
        try:
            # Looked at after it is watched, so that nothing is missed in between.
            if self._has_mark(request_id):
                request.withdraw()
            yield request
        finally:
            # Gone already if the broker has delivered the request twice.
            self._watched.pop(request_id, None)

    def _has_mark(self, request_id: str) -> bool:
        try:
            return bool(self._redis.exists(keys.withdrawn(request_id)))
        except RedisError as exc:  # whoever took the request from Redis answers it all the same
            logger.warning("cannot tell whether request %s was withdrawn: %s", request_id, exc)
            return False

    def _run(self) -> None:
        while not self._leaving.is_set():
            try:
                self._listen()
            except RedisError as exc:
                logger.warning("cannot hear of withdrawn requests, will try again: %s", exc)
                self._leaving.wait(_PAUSE_S)

    def _listen(self) -> None:
        pubsub: Any = self._redis.pubsub  # without annotations in its package
        with pubsub(ignore_subscribe_messages=True) as channel:
            channel.subscribe(keys.WITHDRAWN)
            while not self._leaving.is_set():
                message = channel.get_message(timeout=_POLL_S)
                request = self._watched.get(message["data"].decode()) if message else None
                if request is not None:
                    request.withdraw()
