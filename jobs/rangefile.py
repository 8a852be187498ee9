"""A file that lies elsewhere, read by ranges."""

from __future__ import annotations

import io
from abc import abstractmethod
from typing import Any


class RangeFile(io.RawIOBase):
    """A file of `size` bytes that can be read at any position, each read being one range."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._position = 0

    @abstractmethod
    def read_range(self, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop`."""

    def readable(self) -> bool:
        """Tell that it is for reading."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be read at any position."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - whatever has a buffer
        """Fill `buffer` from the position on -> how many bytes there were."""
        stop = min(self._size, self._position + len(buffer))
        if stop <= self._position:
            return 0
        piece = self.read_range(self._position, stop)
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)
