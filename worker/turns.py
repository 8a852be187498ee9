"""Chunks side by side, or one alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_POLL_S = 0.1


class Turns:
    """Lets chunks run side by side, but one that may end the process only alone.

    Nobody begins while one waits to be alone: with many threads it might wait for ever.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._alone = False
        self._wait_to_be_alone = 0

    @contextmanager
    def take(self, *, alone: bool, waiting: Callable[[], None]) -> Iterator[None]:
        """Wait for a turn, and have it for the length of the block.

        Args:
            alone: whether nothing else may run meanwhile.
            waiting: called now and then; what it raises ends the wait.
        """
        with self._changed:
            self._wait_to_be_alone += alone
            try:
                while self._alone or (self._running if alone else self._wait_to_be_alone):
                    waiting()
                    self._changed.wait(_POLL_S)
            finally:
                self._wait_to_be_alone -= alone
            self._running += 1
            self._alone = alone
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._alone = False
                self._changed.notify_all()
