"""Files of an object store as HTTP responses; those on this machine are starlette's `FileResponse`."""

from __future__ import annotations

import re

from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from api.problems import Problem
from jobs.errors import PartNotReadyError
from jobs.storage import Storage

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


async def stored_response(storage: Storage, name: str, media_type: str, filename: str, asked: str | None) -> Response:
    """Stream a file, or the one range of it that the `Range` header `asked` names; other headers of it are ignored.

    Raises:
        PartNotReadyError: the file has gone.
        Problem: 416, the range is outside the file.
    """
    size = await run_in_threadpool(storage.size, name)
    if size is None:
        raise PartNotReadyError(f"{name} has been deleted")
    asked_range = _range(asked, size)
    start, stop = asked_range or (0, size)
    headers = {
        "Accept-Ranges": "bytes",
        "Content-Disposition": f'attachment; filename="{filename}"',
        "Content-Length": str(stop - start),
    }
    if asked_range is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    pieces = storage.stream(name, start, stop)
    return StreamingResponse(pieces, 206 if asked_range else 200, headers, media_type=media_type)


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
        raise Problem(416, "range-not-satisfiable", f"Range: the file has {size} bytes", headers=headers, field="Range")
    return start, stop
