"""What web pages may do. A browser sends the calls of any page it shows, also to a server that only it can reach."""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.problems import Problem, respond, shorten
from jobs.errors import SettingsError
from jobs.loopback import is_loopback

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+")
_SAFE = {"GET", "HEAD", "OPTIONS"}
_REQUEST_HEADERS = (
    "Authorization",
    "Content-Encoding",
    "Content-Type",
    "Idempotency-Key",
    "If-Match",
    "If-None-Match",
    "If-Range",
    "Last-Event-ID",
    "Range",
    "X-Request-ID",
)
_RESPONSE_HEADERS = (
    "Accept-Ranges",
    "Content-Disposition",
    "Content-Range",
    "ETag",
    "Idempotency-Replayed",
    "Layerstack-Encode-Ms",
    "Layerstack-Fingerprint",
    "Layerstack-Num-Tokens",
    "Layerstack-Queue-Ms",
    "Layerstack-Truncated",
    "Location",
    "RateLimit-Limit",
    "RateLimit-Remaining",
    "RateLimit-Reset",
    "Repr-Digest",
    "Retry-After",
    "X-Request-ID",
)


def check_origins(origins: Collection[str] | None) -> tuple[str, ...]:
    """Return the origins that may call, none of which a browser could never send.

    Raises:
        SettingsError: one is no origin; the message names the variable and the value.
    """
    for origin in origins or ():
        if not _ORIGIN.fullmatch(origin):
            raise SettingsError(
                f"LAYERSTACK_CORS_ORIGINS={origin!r}: an origin is a scheme, a host and perhaps a port, such as "
                "https://example.org, without a path or a slash at its end; * stands for all"
            )
    return tuple(origins or ())


class OriginCheck:
    """ASGI middleware for a server without keys: pages of other origins change nothing.

    A page can have a browser post to this server, though not read the answer (403 then). By a name of its own that
    leads to 127.0.0.1 it could even do that, so such a server answers to names that no page can have (421).

    Args:
        app: what is behind it.
        origins: whose pages may call all the same; `*` is all of them.
        hosts: what the Host header may name besides loopback; None lets it name anything.
    """

    def __init__(self, app: ASGIApp, *, origins: Collection[str], hosts: Collection[str] | None) -> None:
        self.app = app
        self._origins = origins
        self._hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Look at the headers with which browsers say where a call comes from."""
        if scope["type"] == "http" and (problem := self._find(scope)) is not None:
            await respond(problem)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _find(self, scope: Scope) -> Problem | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = _hostname(host)
        if self._hosts is not None and name not in self._hosts and not is_loopback(name):
            detail = (
                f"Host: without keys, this server answers to localhost, 127.0.0.1, [::1] and the names of "
                f"LAYERSTACK_ALLOWED_HOSTS only; got {shorten(host)}; see also LAYERSTACK_API_KEYS and "
                "LAYERSTACK_ALLOW_WITHOUT_KEYS"
            )
            return Problem("host-not-allowed", detail, field="Host", value=shorten(host))
        if scope["method"] in _SAFE or not self._is_foreign(headers, host):
            return None
        return _refused(headers.get("origin", "unknown"))

    def _is_foreign(self, headers: Headers, host: str) -> bool:
        """Tell whether the page of another origin sent this. Only browsers send these headers."""
        origin = headers.get("origin")
        if origin is not None and ("*" in self._origins or origin in self._origins):
            return False
        site = headers.get("sec-fetch-site")  # says more than Origin, as a proxy may have changed Host
        if site is not None:
            return site not in {"same-origin", "none"}
        return origin is not None and origin.partition("://")[2] != host


class Cors(CORSMiddleware):
    """Starlette's, with a problem document for a preflight that is refused."""

    def __init__(self, app: ASGIApp, *, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=_REQUEST_HEADERS,
            expose_headers=_RESPONSE_HEADERS,
            allow_private_network=True,  # who names an origin means it, on a loopback address as well
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return the answer to a preflight."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:  # noqa: PLR2004 - where the errors of HTTP begin
            return response
        answer = respond(_refused(request_headers["origin"], reason=bytes(response.body).decode()))
        answer.headers.update({n: v for n, v in response.headers.items() if n.startswith(("access-control-", "vary"))})
        return answer


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # half a bracket, say
        return ""


def _refused(origin: str, reason: str = "a page of another origin may not do this") -> Problem:
    detail = f"Origin: {reason}; got {shorten(origin)}; LAYERSTACK_CORS_ORIGINS names the origins that may call"
    return Problem("cross-origin", detail, field="Origin", value=shorten(origin))
