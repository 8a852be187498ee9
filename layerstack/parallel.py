"""Several calls at a time, from async code and from code that is not."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import CancelledError, Future, wait
from functools import partial
from typing import Any, TypeVar

import anyio

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
        self._guard = threading.Lock()
        self._pid = os.getpid()
        self._loop: _Loop | None = None
        self._is_closed = False

    def run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what `call` returns. Ctrl-C, or whatever else ends the wait, cancels it, and waits for its end.

        Raises:
            RuntimeError: it is closed, or this process is the fork of the one that made the thread.
        """
        return self._running().run(call)

    def iterate(self, stream: AsyncGenerator[T]) -> Iterator[T]:
        """Yield what `stream` yields."""
        end = object()
        streams = self._running().streams
        streams.add(stream)

        async def next_one() -> T | object:
            return await anext(stream, end)

        try:
            while (each := self.run(next_one)) is not end:
                yield each  # type: ignore[misc] # `end` is compared with just above
        finally:
            if stream in streams and not self._is_closed:
                streams.discard(stream)
                self.run(stream.aclose)

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """End what other threads wait for, run `last` and end the thread, if it has begun."""
        if self._loop is not None and not self._is_closed and self._pid == os.getpid():
            self._loop.end(last)
        self._is_closed = True

    def _running(self) -> _Loop:
        if self._pid != os.getpid():
            raise RuntimeError("a Client does not work in the fork of the process that made it: make a new one there")
        if self._is_closed:
            raise RuntimeError("this Client is closed")
        with self._guard:
            if self._loop is None:
                self._loop = _Loop()
                # At the end of the process the thread stands still, and whoever waits for it would wait for ever.
                weakref.finalize(self, _end_with_process, self._pid, self._loop)
            return self._loop


class _Loop:
    """An event loop that runs in a thread, until `end`.

    anyio has such a thing (`start_blocking_portal`), but a call of it cannot be cancelled if Ctrl-C comes while it is
    handed over.

    Attributes:
        streams: that have been begun, and are closed before the loop ends.
    """

    def __init__(self) -> None:
        self.streams: set[AsyncGenerator[Any]] = set()
        self._calls: dict[Future[Any], Callable[[], None]] = {}  # those that are waited for, and what cancels each
        ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

        async def until_stopped() -> None:
            stop = asyncio.Event()
            ready.set_result((asyncio.get_running_loop(), stop))
            await stop.wait()

        self._thread = threading.Thread(target=lambda: asyncio.run(until_stopped()), name="layerstack", daemon=True)
        self._thread.start()
        self._loop, self._stop = ready.result()

    def run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """See `EventLoopThread.run`."""
        result: Future[T] = Future()
        tasks: list[asyncio.Task[T]] = []

        def start() -> None:
            tasks.append(self._loop.create_task(call()))
            tasks[0].add_done_callback(partial(_hand_over, result))

        def cancel() -> None:
            if tasks:
                tasks[0].cancel()
            elif not result.done():  # Ctrl-C was faster
                result.set_exception(CancelledError())

        try:
            self._calls[result] = cancel
            self._loop.call_soon_threadsafe(start)
            return result.result()
        except BaseException:
            if not result.done():
                self._loop.call_soon_threadsafe(cancel)  # after `start`, if that has been asked for
                wait([result])
            raise
        finally:
            self._calls.pop(result, None)

    def end(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Cancel all calls, close the streams, run `last`, and stop."""
        under_way = dict(self._calls)
        for cancel in under_way.values():
            self._loop.call_soon_threadsafe(cancel)
        wait(under_way)
        while self.streams:
            self.run(self.streams.pop().aclose)
        self.run(last)
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    @property
    def is_running(self) -> bool:
        """Whether it has not been ended."""
        return self._thread.is_alive()


def _hand_over(result: Future[T], task: asyncio.Task[T]) -> None:
    if task.cancelled():
        result.set_exception(CancelledError())
    elif (exc := task.exception()) is not None:
        result.set_exception(exc)
    else:
        result.set_result(task.result())


def _end_with_process(pid: int, loop: _Loop) -> None:
    async def nothing() -> None:
        pass

    if os.getpid() == pid and loop.is_running:  # the thread is not in a fork
        loop.end(nothing)
