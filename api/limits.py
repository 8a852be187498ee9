"""Keeps bodies within their limit while they arrive, before anybody holds them in memory."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.media_types import essence
from api.problems import Problem, respond


class BodyLimit:
    """ASGI middleware: a body above its limit is answered with 413.

    JSON is held in memory and has the lower limit; uploads go to disk as they arrive.
    """

    def __init__(self, app: ASGIApp, *, json_max_bytes: int, upload_max_bytes: int) -> None:
        self._app = app
        self._json_max_bytes = json_max_bytes
        self._upload_max_bytes = upload_max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what `receive` brings."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)  # of a header that is there twice, the first counts, as for the routes
        limit = self._limit(scope["path"], headers.get("content-type"))
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            await respond(_too_large(int(declared), limit))(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise _too_large(received, limit)
            return message

        await self._app(scope, counted, send)

    def _limit(self, path: str, content_type: str | None) -> int:
        is_json = essence(content_type) in {"application/json", ""}
        return self._json_max_bytes if is_json or path != "/jobs" else self._upload_max_bytes


def _too_large(size: int, limit: int) -> Problem:
    detail = f"the body has {size} bytes or more, the limit is {limit}; longer prompt lists go to POST /jobs as a file"
    return Problem("body-too-large", detail, field="body", limit=limit, see="/jobs")
