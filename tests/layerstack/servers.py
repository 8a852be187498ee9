"""Servers that answer what a test says, over real HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread


@dataclass
class Request:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What to send.

    Of a body that breaks off, only `stop` bytes are sent before the connection is closed, which waits for `hold`.
    """

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    stop: int | None = None
    hold: Event | None = None


def problem(status: int, kind: str, **more: object) -> Answer:
    """A problem document."""
    headers = {"Content-Type": "application/problem+json"}
    if "retry_after" in more:
        headers["Retry-After"] = str(more.pop("retry_after"))
    document = {"type": f"urn:layerstack:problem:{kind}", "status": status, "detail": kind, **more}
    return Answer(status, json.dumps(document).encode(), headers)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        request = Request(self.command, self.path, dict(self.headers), self._body())
        self.server.seen.append(request)
        answer = self.server.respond(request)
        if answer is None:  # no answer at all
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body[: answer.stop])
        if answer.hold is not None:
            answer.hold.wait(30)
        self.close_connection = answer.stop is not None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def answering(respond: Callable[[Request], Answer | None], port: int = 0) -> Iterator[ThreadingHTTPServer]:
    """A server on loopback; its `url` and the requests that it has `seen` are there to be looked at."""
    with ThreadingHTTPServer(("127.0.0.1", port), _Handler) as server:
        server.respond, server.seen = respond, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def in_turn(*answers: Answer | None) -> Callable[[Request], Answer | None]:
    """Give one answer after the other; the last one for ever."""
    left = list(answers)
    return lambda _request: left.pop(0) if len(left) > 1 else left[0]
