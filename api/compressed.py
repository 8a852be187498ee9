"""Bodies and files that come compressed: which coding it is, and the content, expanded while it is read."""

from __future__ import annotations

import io
from enum import StrEnum
from pathlib import PurePath
from typing import IO, Any

import pyarrow as pa

from api.media_types import essence
from api.problems import Problem, shorten

_BUFFER_BYTES = 2**18


class Coding(StrEnum):
    """How content may be compressed."""

    GZIP = "gzip"
    ZSTD = "zstd"


_NAMES = {"gzip": Coding.GZIP, "x-gzip": Coding.GZIP, "zstd": Coding.ZSTD}
_BY_SUFFIX = {".gz": Coding.GZIP, ".zst": Coding.ZSTD}
_BY_MEDIA_TYPE = {
    "application/gzip": Coding.GZIP,
    "application/x-gzip": Coding.GZIP,
    "application/zstd": Coding.ZSTD,
}


def content_coding(header: str | None) -> Coding | None:
    """Return what the header `Content-Encoding` says; None if the body is not compressed.

    Raises:
        Problem: 415, it is a coding that we do not know, or several.
    """
    name = (header or "").strip().lower()
    if name in {"", "identity"}:
        return None
    if name not in _NAMES:
        accepted = ", ".join(Coding)
        detail = f"Content-Encoding: a body has one of {accepted}, or none; got {shorten(header)}"
        headers = {"Accept-Encoding": accepted}
        raise Problem("unsupported-media-type", detail, headers=headers, field="Content-Encoding")
    return _NAMES[name]


def file_coding(filename: str | None, media_type: str | None) -> tuple[Coding | None, str | None]:
    """Return how an uploaded file is compressed, and its name without the suffix that says so."""
    by_name = _BY_SUFFIX.get(PurePath(filename or "").suffix.lower())
    if by_name is not None:
        return by_name, PurePath(filename or "").stem
    return _BY_MEDIA_TYPE.get(essence(media_type)), filename


def expanded(file: IO[bytes], coding: Coding | None, *, max_bytes: int, field: str) -> IO[bytes]:
    """Return a file that reads as the content of `file`; it cannot seek, unless there is no coding.

    Several gzip members or zstd frames in a row are one content. Reading holds a few pieces, and the window of a frame,
    which has at most 128 MiB.

    Args:
        file: what is compressed.
        coding: how; None returns `file` itself.
        max_bytes: of the content.
        field: named by errors.

    Returns:
        A file whose reads raise a `Problem`: 422 if the content is damaged or cut off, 413 if it is too long.
    """
    return file if coding is None else io.BufferedReader(_Expanded(file, coding, max_bytes, field), _BUFFER_BYTES)


class _Expanded(io.RawIOBase):
    """The content of a compressed file, with arrow's errors translated."""

    def __init__(self, file: IO[bytes], coding: Coding, max_bytes: int, field: str) -> None:
        self._stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), coding.value)
        self._coding, self._max_bytes, self._field = coding, max_bytes, field
        self._size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - whatever has a buffer
        try:
            piece = self._stream.read(len(buffer))
        except OSError as exc:
            if exc.errno is not None:  # our disk failed; what arrow finds has no number
                raise
            detail = f"{self._field}: damaged or cut off {self._coding}, after {self._size} bytes of content ({exc})"
            raise Problem("invalid-request", detail, field=self._field) from exc
        self._size += len(piece)
        if self._size > self._max_bytes:
            detail = f"{self._field}: expanded, it has more than {self._max_bytes} bytes, which is the limit"
            raise Problem("body-too-large", detail, field=self._field, limit=self._max_bytes)
        buffer[: len(piece)] = piece
        return len(piece)
