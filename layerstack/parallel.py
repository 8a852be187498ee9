"""Several calls at a time, from async code and from code that is not."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, TypeVar

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

    The thread begins with the first call, so that one who makes a client and does nothing has none. It ends by `close`,
    or with the process.
    """

    def __init__(self) -> None:
        self._resources = ExitStack()
        self._portal: BlockingPortal | None = None
        self._guard = threading.Lock()
        self._pid = os.getpid()
        self._calls: dict[Future[Any], threading.Event] = {}
        self._streams: set[AsyncGenerator[Any]] = set()
        self._is_closed = False

    def run(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return what `call` returns. Ctrl-C, or whatever else ends the wait, cancels it first.

        Raises:
            RuntimeError: it is closed, or this process is the fork of the one that made the thread.
        """
        ended = threading.Event()  # a future that is cancelled counts as done before its call has ended

        async def to_its_end() -> T:
            try:
                return await call()
            finally:
                ended.set()

        future = self._running().start_task_soon(to_its_end)
        self._calls[future] = ended
        try:
            return future.result()
        except BaseException:
            future.cancel()
            ended.wait()
            raise
        finally:
            del self._calls[future]

    def iterate(self, stream: AsyncGenerator[T]) -> Iterator[T]:
        """Yield what `stream` yields."""
        end = object()
        self._streams.add(stream)
        try:
            while (each := self.run(lambda: anext(stream, end))) is not end:
                yield each  # type: ignore[misc] # `end` is compared with just above
        finally:
            if stream in self._streams and not self._is_closed:
                self._streams.discard(stream)
                self.run(stream.aclose)

    def close(self, last: Callable[[], Awaitable[None]]) -> None:
        """End what other threads wait for, run `last` and end the thread, if it has begun."""
        if self._portal is not None and not self._is_closed and self._pid == os.getpid():
            for future, ended in list(self._calls.items()):
                future.cancel()
                ended.wait()
            _end_streams(self._portal, self._streams)
            self.run(last)
            _end(self._portal, self._streams, self._resources)
        self._is_closed = True

    def _running(self) -> BlockingPortal:
        if self._pid != os.getpid():
            raise RuntimeError("a Client does not work in the fork of the process that made it: make a new one there")
        if self._is_closed:
            raise RuntimeError("this Client is closed")
        with self._guard:
            if self._portal is None:
                self._portal = self._resources.enter_context(start_blocking_portal())
                # At the end of the process the thread stands still, and whoever waits for it would wait for ever.
                weakref.finalize(self, _end_with_process, self._pid, self._portal, self._streams, self._resources)
            return self._portal


def _end_with_process(
    pid: int, portal: BlockingPortal, streams: set[AsyncGenerator[Any]], resources: ExitStack
) -> None:
    if os.getpid() == pid:  # the thread is not in a fork
        _end(portal, streams, resources)


def _end(portal: BlockingPortal, streams: set[AsyncGenerator[Any]], resources: ExitStack) -> None:
    with suppress(RuntimeError):  # it has ended already
        _end_streams(portal, streams)
        # A call that Ctrl-C cut off while it was being made is known to nobody else.
        portal.call(partial(portal.stop, cancel_remaining=True))
    resources.close()


def _end_streams(portal: BlockingPortal, streams: set[AsyncGenerator[Any]]) -> None:
    """Close streams that nobody has read to their end."""
    while streams:
        portal.call(streams.pop().aclose)
