"""Several calls at a time, from async code and from code that is not."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import wait
from contextlib import ExitStack
from typing import TypeVar

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal

T = TypeVar("T")


async def in_parallel(calls: Iterable[Callable[[], Awaitable[T]]], limit: int) -> list[T]:
    """Run `calls`, `limit` of them at a time, and return their results in order; the first error ends all."""
    results: dict[int, T] = {}
    failures: list[Exception] = []
    waiting = enumerate(calls)
    async with anyio.create_task_group() as group:

        async def work() -> None:
            try:
                for position, call in waiting:
                    results[position] = await call()
            except Exception as exc:  # noqa: BLE001 - raised below, as it is and not in a group
                failures.append(exc)
                group.cancel_scope.cancel()

        for _ in range(limit):
            group.start_soon(work)
    if failures:
        raise failures[0]
    return [results[position] for position in sorted(results)]


class EventLoopThread:
    """Runs async calls for code that is not async, on an event loop in a thread of its own.

    The thread begins with the first call, so that one who makes a client and does nothing has none.
    """

    def __init__(self) -> None:
        self._resources = ExitStack()
        self._portal: BlockingPortal | None = None
        self._guard = threading.Lock()
        self._pid = os.getpid()

    def run(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return what `call` returns. Ctrl-C, or whatever else ends the wait, cancels it first.

        Raises:
            RuntimeError: this process is the fork of the one that made the thread.
        """
        future = self._running().start_task_soon(call)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            wait([future])
            raise

    def iterate(self, stream: AsyncGenerator[T]) -> Iterator[T]:
        """Yield what `stream` yields."""
        end = object()
        try:
            while (each := self.run(lambda: anext(stream, end))) is not end:
                yield each  # type: ignore[misc] # `end` is compared with just above
        finally:
            self.run(stream.aclose)

    def close(self, last: Callable[[], Awaitable[None]]) -> None:
        """Run `last` and end the thread, if it has begun."""
        if self._portal is not None and self._pid == os.getpid():
            self.run(last)
            self._resources.close()
            self._portal = None

    def _running(self) -> BlockingPortal:
        if self._pid != os.getpid():
            raise RuntimeError("a Client does not work in the fork of the process that made it: make a new one there")
        with self._guard:
            if self._portal is None:
                self._portal = self._resources.enter_context(start_blocking_portal())
            return self._portal
