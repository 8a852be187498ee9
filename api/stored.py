"""Files of the storage as HTTP responses: whole or a range, on conditions (RFC 9110, sections 13 and 14)."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool

from api.problems import Problem
from api.readstream import ReadStream
from jobs.errors import PartNotReadyError
from jobs.storage import Storage

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')


@dataclass(frozen=True)
class StoredContent:
    """A file that never changes.

    Attributes:
        storage: where it is.
        name: in the storage.
        size: in bytes.
        sha256: of its content, in hexadecimal.
        media_type: of its content.
        filename: for whoever saves it.
    """

    storage: Storage
    name: str
    size: int
    sha256: str
    media_type: str
    filename: str

    @property
    def etag(self) -> str:
        """The strong validator."""
        return f'"{self.sha256}"'

    def headers(self) -> dict[str, str]:
        """Return what every answer with the content says of it."""
        digest = base64.b64encode(bytes.fromhex(self.sha256)).decode()
        return {
            "Accept-Ranges": "bytes",
            "Content-Disposition": f'attachment; filename="{self.filename}"',
            "ETag": self.etag,
            "Repr-Digest": f"sha-256=:{digest}:",
        }


async def stored_response(request: Request, content: StoredContent) -> Response:
    """Answer a GET or HEAD with the content, or with the one range of it that is asked for.

    The content is read piece by piece in threads, each when the one before has been sent: a slow reader holds none.

    Raises:
        PartNotReadyError: the file has gone.
        Problem: 412, `If-Match` names something else; 416, the range is outside the file.
    """
    check_match(request, content.etag)
    if is_known(request, content.etag):
        return Response(status_code=304, headers={"ETag": content.etag})
    asked = _range(_asked_range(request, content), content.size)
    start, stop = asked or (0, content.size)
    headers = content.headers() | {"Content-Length": str(stop - start)}
    if asked is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{content.size}"
    status = 200 if asked is None else 206
    if request.method == "HEAD":
        return Response(None, status, headers, content.media_type)
    pieces = content.storage.stream(content.name, start, stop)
    try:  # what is wrong with the storage is told before the headers
        first = await run_in_threadpool(next, pieces, b"")
    except FileNotFoundError as exc:
        raise PartNotReadyError(f"{content.name} has been deleted") from exc
    return ReadStream(first, pieces, status, headers, content.media_type)


def check_match(request: Request, etag: str) -> None:
    """Hold the request to its `If-Match`.

    Raises:
        Problem: 412, it names something else.
    """
    asked = _listed(request, "if-match")
    if asked is None or asked.strip() == "*" or etag in _strong_tags(asked):
        return
    raise Problem("precondition-failed", f"If-Match: the ETag is {etag}", headers={"ETag": etag}, field="If-Match")


def is_known(request: Request, etag: str) -> bool:
    """Whether the client has it already, by its `If-None-Match`; `etag` may be weak."""
    asked = _listed(request, "if-none-match")
    if asked is None:
        return False
    return asked.strip() == "*" or etag.removeprefix("W/") in {f'"{tag}"' for _, tag in _TAG.findall(asked)}


def _listed(request: Request, name: str) -> str | None:
    """Return a header that may be there several times."""
    found = request.headers.getlist(name)
    return ", ".join(found) if found else None


def _strong_tags(header: str) -> set[str]:
    return {f'"{tag}"' for weak, tag in _TAG.findall(header) if not weak}


def _asked_range(request: Request, content: StoredContent) -> str | None:
    """Return the header `Range` if it counts: of a GET, and if `If-Range` is not about something else."""
    condition = request.headers.get("if-range")
    counts = request.method == "GET" and (condition is None or condition.strip() == content.etag)
    return request.headers.get("range") if counts else None


def _range(asked: str | None, size: int) -> tuple[int, int] | None:
    """Return where the range that is asked for begins and ends, or None if all is asked for, or nothing sensible."""
    found = _RANGE.fullmatch(asked or "")
    if found is None or found[1] == found[2] == "":
        return None
    if found[1] == "":
        start, stop = max(0, size - int(found[2])), size
    else:
        start, stop = int(found[1]), int(found[2]) + 1 if found[2] else size
        if found[2] and start >= stop:
            return None
        stop = min(size, stop)
    if start >= stop:
        headers = {"Content-Range": f"bytes */{size}"}
        detail = f"Range: the file has {size} bytes"
        raise Problem("range-not-satisfiable", detail, headers=headers, field="Range", limit=size)
    return start, stop
