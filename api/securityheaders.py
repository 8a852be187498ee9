"""Headers that keep browsers from doing more with an answer than to show it."""

from __future__ import annotations

import base64
import hashlib
import re

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


class SecurityHeaders:
    """ASGI middleware: adds the headers to every answer that does not set them itself."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add the headers when the answer starts."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                # What has an ETag may be kept by the caller, who asks each time whether it still holds.
                headers.setdefault("Cache-Control", "private, no-cache" if "etag" in headers else "no-store")
            await send(message)

        await self.app(scope, receive, with_headers)


def page_policy(html: str) -> str:
    """Return the content security policy of a page of ours: of inline scripts and styles it allows its own."""
    found: dict[str, str] = {"script": "", "style": ""}
    for kind, content in _INLINE.findall(html):
        found[kind] += f" 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    return (
        f"default-src 'none'; script-src 'self'{found['script']}; style-src 'self'{found['style']}; "
        "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
