"""How far `layerstack encode` is, for whoever watches it."""

from __future__ import annotations

import threading
import time
from typing import Protocol

TELL_EVERY_S = 0.1


class Watcher(Protocol):
    """Hears how far the work is, from any thread."""

    def loading(self, model: str) -> None:
        """Hear that the model is about to be loaded."""

    def encoding(self, done: int, total: int) -> None:
        """Hear how many prompts are encoded, those of an earlier run included."""

    def checking(self, done: int, total: int) -> None:
        """Hear how many parts have been read again and are what they should be."""


class Progress:
    """Adds up the prompts that are done, and tells of them now and then. Thread-safe."""

    def __init__(self, rows: dict[int, int], total: int, watcher: Watcher) -> None:
        self._rows, self._total, self._watcher = rows, total, watcher
        self._done, self._told_at = sum(rows.values()), 0.0
        self._guard = threading.Lock()
        watcher.encoding(self._done, total)

    def note(self, chunk: int, rows: int, *, at_once: bool = False) -> None:
        """Hear how many prompts of a chunk are done.

        Args:
            chunk: which one.
            rows: prompts of it, in all.
            at_once: tell of it now.
        """
        with self._guard:
            self._done += rows - self._rows.get(chunk, 0)
            self._rows[chunk] = rows
            if at_once or time.monotonic() >= self._told_at + TELL_EVERY_S:
                self._told_at = time.monotonic()
                self._watcher.encoding(self._done, self._total)
