"""Content codings of answers, made while they are sent."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator

import zstandard

from api.compressed import Coding

# The fastest: on floats written as text, higher ones gain a few percent and take several times as long.
_GZIP_LEVEL = 1
_ZSTD_LEVEL = 1
_RAW_DEFLATE = -15
# RFC 1952: magic, deflate, no flags, no time, made by the fastest level, on an unknown system.
_GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x04\xff"
# RFC 1951: the last block, with the fixed codes, and nothing in it.
_LAST_BLOCK = b"\x03\x00"


def coded(pieces: Iterable[memoryview], coding: Coding) -> Iterator[bytes]:
    """Return `pieces` compressed, one at a time; no piece is read before the one before it is taken."""
    return _zstd(pieces) if coding is Coding.ZSTD else _gzip(pieces)


def _zstd(pieces: Iterable[memoryview]) -> Iterator[bytes]:
    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj()
    for piece in pieces:
        if compressed := compressor.compress(piece):
            yield compressed
    yield compressor.flush()


def _gzip(pieces: Iterable[memoryview]) -> Iterator[bytes]:
    """Compress each piece by itself, so that a piece that comes again, as pad rows do, is compressed once.

    Deflate looks back 32 KiB only, less than one row of the real model: it would not find that rows are the same.
    """
    yield _GZIP_HEADER
    checksum = size = 0
    last: memoryview | None = None
    compressed = b""
    for piece in pieces:
        if piece is not last:
            compressor = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _RAW_DEFLATE)
            # The flush ends at a byte and leaves the stream open.
            compressed, last = compressor.compress(piece) + compressor.flush(zlib.Z_SYNC_FLUSH), piece
        checksum = zlib.crc32(piece, checksum)
        size += len(piece)
        yield compressed
    yield _LAST_BLOCK + struct.pack("<II", checksum, size % 2**32)
