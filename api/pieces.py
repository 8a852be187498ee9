"""A large body as pieces that are sent one after the other and never joined."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MAX_PIECE_BYTES = 2**20
# Below this, copying is cheaper than sending apart.
_SMALL_BYTES = 2**16


class Pieces(io.RawIOBase):
    """Takes what is written, small things joined and large ones cut, without copying the large ones.

    A file that cannot seek, so that `zipfile` writes into it. What was written must not change afterwards.
    """

    def __init__(self) -> None:
        self.size = 0
        self._pieces: list[memoryview] = []
        self._small = bytearray()

    def writable(self) -> bool:
        """Return True, as a file that is open for writing."""
        return True

    def write(self, content: ReadableBuffer) -> int:
        """Append `content`; return its size in bytes."""
        view = content if isinstance(content, memoryview) else memoryview(content)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
        self.size += len(view)
        if len(view) < _SMALL_BYTES:
            self._small += view
            if len(self._small) >= _SMALL_BYTES:
                self._finish_small()
        else:
            self._finish_small()
            # One that needs no cutting stays the same object: a coding knows by that what it has coded just before.
            self._pieces += [view] if len(view) <= MAX_PIECE_BYTES else cut(view)
        return len(view)

    def finish(self) -> list[memoryview]:
        """Return the pieces, none of which is empty or longer than `MAX_PIECE_BYTES`."""
        self._finish_small()
        return self._pieces

    def _finish_small(self) -> None:
        if self._small:
            self._pieces.append(memoryview(bytes(self._small)))
            self._small.clear()


def cut(view: memoryview, size: int = MAX_PIECE_BYTES) -> list[memoryview]:
    """Return `view`, which is of bytes, in slices of `size` bytes; the last one may be shorter."""
    return [view[start : start + size] for start in range(0, len(view), size)]
