"""Looks at every request from outside: counts it, times it, and writes its line to the log."""

from __future__ import annotations

import logging
import time
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import quote

import structlog
from asgi_correlation_id import correlation_id
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.metrics import Metrics

logger = logging.getLogger("api.access")
_PROBES = {"/health", "/ready", "/metrics"}
# Anybody can send any other word: each would be a metric of its own.
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_SHOWN_PATH = 500
# nginx's number for it: no answer arrived whole.
_CLIENT_CLOSED = 499


def is_probe(scope: MutableMapping[str, Any]) -> bool:
    """Tell whether a request is one of those that come all the time and say nothing: no line, no span."""
    return scope["path"] in _PROBES


class Observer:
    """ASGI middleware that feeds `Metrics` and the logger `api.access`.

    It stands within the one that gives a request its id, which all log lines of the request tell.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and look at what becomes of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        self._metrics.in_progress.inc()
        tokens = structlog.contextvars.bind_contextvars(request_id=correlation_id.get())
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            self._metrics.in_progress.dec()
            self._tell(exchange)
            structlog.contextvars.reset_contextvars(**tokens)

    def _tell(self, exchange: _Exchange) -> None:
        seconds, status, metrics = time.perf_counter() - exchange.started, exchange.final_status, self._metrics
        method = exchange.method if exchange.method in _METHODS else "other"
        metrics.requests.labels(method, exchange.route, str(status)).inc()
        metrics.durations.labels(method, exchange.route).observe(seconds)
        metrics.sent_bytes.labels(method, exchange.route).inc(exchange.sent_bytes)
        if not is_probe(exchange.scope) and logger.isEnabledFor(logging.INFO):
            _log(exchange, status, seconds)


class _Exchange:
    """One request, and how far its answer is."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.started = time.perf_counter()
        self.scope = scope
        self.sent_bytes = 0
        self._receive = receive
        self._send = send
        self._status: int | None = None
        self._is_complete = False
        self._client_left = False

    @property
    def method(self) -> str:
        return str(self.scope["method"])

    @property
    def path(self) -> str:
        return str(self.scope["path"])

    @property
    def route(self) -> str:
        """Its template, as `/jobs/{job_id}`; `none` if it was refused before, or there is none."""
        return str(getattr(self.scope.get("route"), "path", "none"))

    @property
    def final_status(self) -> int:
        """What was answered; 499 if the client left before the end of it, and 500 if the server did not come to it."""
        if self._client_left:
            return _CLIENT_CLOSED
        return self._status if self._is_complete and self._status is not None else 500

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._is_complete:
            self._client_left = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif message["type"] == "http.response.body":
            self.sent_bytes += len(message.get("body", b""))
            self._is_complete = not message.get("more_body", False)
        await self._send(message)


def _log(exchange: _Exchange, status: int, seconds: float) -> None:
    scope = exchange.scope
    query = scope["query_string"].decode("ascii", "backslashreplace")
    path = (quote(exchange.path) + (f"?{query}" if query else ""))[:_SHOWN_PATH]
    client = scope.get("client")
    extra = {
        "client": client[0] if client else None,
        "method": exchange.method,
        "path": path,
        "route": exchange.route,
        "status": status,
        "duration_s": round(seconds, 6),
        "sent_bytes": exchange.sent_bytes,
    }
    logger.info("%s %s %d in %.1f ms", exchange.method, path, status, seconds * 1e3, extra=extra)
