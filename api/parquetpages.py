"""The page headers of a Parquet file, which tell how large a page becomes before anybody decompresses it.

A header is a struct in Thrift's compact protocol. Two of its fields matter here, the others are skipped. Where a header
could be understood in two ways, this understands it as arrow does: nobody may show us another size than arrow.
"""

from __future__ import annotations

import os
from typing import IO

_UNCOMPRESSED_SIZE, _COMPRESSED_SIZE = 2, 3  # the fields of PageHeader
_HEADER_BYTES = (2**9, 2**16, 2**24)  # what is read of it, until it is whole; statistics may be in it
_MAX_DEPTH = 8
# Writers make pages of about a megabyte, or of some thousand rows.
_MAX_PAGES = 2**17
_MAX_VARINT_BYTES = 10
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_NUM_BYTES = {_TRUE: 0, _FALSE: 0, _BYTE: 1, _DOUBLE: 8}


def largest_page(file: IO[bytes], start: int, length: int) -> int:
    """Return the bytes of the largest page of a column chunk, decompressed; 0 if it has none.

    Args:
        file: is read at the headers only.
        start: where the chunk's first page begins.
        length: bytes of all its pages and their headers.

    Raises:
        ValueError: there is something else than pages.
    """
    largest, at, end = 0, start, start + length
    if not 0 <= start <= end <= file.seek(0, os.SEEK_END):
        raise ValueError(f"a column lies at bytes {start} to {end}, outside the file")
    for _ in range(_MAX_PAGES):
        if at >= end:
            return largest
        header_bytes, uncompressed, compressed = _page_header(file, at)
        largest = max(largest, uncompressed, compressed)  # the former says nothing where pages are not compressed
        at += header_bytes + compressed
    raise ValueError(f"a column has more than {_MAX_PAGES} pages in one row group")


def _page_header(file: IO[bytes], at: int) -> tuple[int, int, int]:
    """Return the length of the header at `at`, and the sizes of its page, decompressed and as it lies there."""
    for num_bytes in _HEADER_BYTES:
        file.seek(at)
        header = _Header(file.read(num_bytes))
        try:
            sizes = header.i32_fields()
        except IndexError:
            continue
        uncompressed, compressed = sizes.get(_UNCOMPRESSED_SIZE, -1), sizes.get(_COMPRESSED_SIZE, -1)
        if uncompressed < 0 or compressed < 0:
            raise ValueError(f"the page header at byte {at} has no sizes")
        return header.at, uncompressed, compressed
    raise ValueError(f"the page header at byte {at} does not end")


class _Header:
    """Reads a struct; `at` is how far. An IndexError says that it goes on after `content`."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.at = 0

    def i32_fields(self) -> dict[int, int]:
        """Read the struct -> its fields of type i32, by their ids."""
        fields: dict[int, int] = {}
        last = 0
        while (kind := self._byte()) != 0:
            # An id is 16 bits to arrow, whatever it is written as.
            last = (last + (kind >> 4) if kind >> 4 else self._signed()) & 0xFFFF
            if kind & 0xF == _I32:
                fields[last] = self._signed()
            else:
                self._skip(kind & 0xF, _MAX_DEPTH)
        return fields

    def _skip(self, kind: int, depth: int) -> None:
        if depth == 0:
            raise ValueError("a page header is nested too deeply")
        if kind in _NUM_BYTES:
            self._pass(_NUM_BYTES[kind])
        elif kind in {_I16, _I32, _I64}:
            self._varint()
        elif kind == _BINARY:
            self._pass(self._varint())
        elif kind in {_LIST, _SET}:
            self._skip_list(depth)
        elif kind == _STRUCT:
            self._skip_struct(depth)
        else:  # a map, too, is in no version of the format
            raise ValueError(f"a page header has a field of type {kind}")

    def _skip_list(self, depth: int) -> None:
        size = self._byte()
        kind, count = size & 0xF, size >> 4
        for _ in range(self._varint() if count == 0xF else count):  # noqa: PLR2004 - then the count follows
            # In a list, unlike in a struct, a bool has a byte: so all values have, and what is there bounds the loop.
            self._skip(_BYTE if kind in {_TRUE, _FALSE} else kind, depth - 1)

    def _skip_struct(self, depth: int) -> None:
        while (kind := self._byte()) != 0:
            if kind >> 4 == 0:
                self._varint()  # the id
            self._skip(kind & 0xF, depth - 1)

    def _pass(self, num_bytes: int) -> None:
        self.at += num_bytes
        if self.at > len(self.content):
            raise IndexError(self.at)

    def _byte(self) -> int:
        value = self.content[self.at]
        self.at += 1
        return value

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 7 * _MAX_VARINT_BYTES, 7):
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:  # noqa: PLR2004 - the other bit says that it goes on
                return value
        raise ValueError("a number in a page header is too long")

    def _signed(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
