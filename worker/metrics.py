"""What a worker counts, and its own `/metrics`, `/health` and `/ready`."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable
from http import HTTPStatus
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from encoder import Engine, Priority
from jobs.errors import SettingsError
from jobs.metrics import new_registry, worker_families
from jobs.records import PartSummary, WorkerCounters, WorkerPresence

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

logger = logging.getLogger(__name__)


class Written:
    """Counts the parts that a worker has written. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts = self._rows = self._bytes = 0

    def add(self, part: PartSummary) -> None:
        """Count a part."""
        with self._lock:
            self._parts += 1
            self._rows += part.rows
            self._bytes += part.bytes

    def totals(self) -> dict[str, int]:
        """Return the fields of `WorkerCounters` that are about parts."""
        with self._lock:
            return {"written_parts": self._parts, "written_rows": self._rows, "written_bytes": self._bytes}


def count(engine: Engine, written: Written) -> WorkerCounters:
    """Return what a worker has counted by now."""
    stats = engine.stats()
    return WorkerCounters(
        token_budget=stats.token_budget,
        waiting_prompts=_by_name(stats.waiting_prompts),
        waiting_rows=stats.waiting_rows,
        batches_waited=_by_name(stats.batches_waited),
        batches=stats.batches,
        prompts=stats.prompts,
        rows=stats.rows,
        capacity=stats.capacity,
        tokenize_seconds=stats.tokenize_seconds,
        queue_seconds=stats.queue_seconds,
        encode_seconds=stats.encode_seconds,
        out_of_memory=stats.out_of_memory,
        failed_prompts=stats.failed_prompts,
        dropped_prompts=stats.dropped_prompts,
        **written.totals(),
    )


class MetricsServer:
    """Serves metrics of this process over HTTP, until it is left as a context manager; without a port, does nothing.

    For orchestrators there are `/health`, which is 200 as long as the process lives, and `/ready`, which is 503 until
    its encoder is loaded.

    Args:
        host: address to listen on.
        port: to listen on.

    Raises:
        SettingsError: the address cannot be listened on.
    """

    def __init__(self, host: str, port: int | None) -> None:
        self._registry = new_registry()
        self._metrics = make_wsgi_app(self._registry)
        self._loaded = False
        self._stop: Callable[[], None] = lambda: None
        if port is None:
            return
        kind = _ServerV6 if ":" in host else _Server
        try:
            server = make_server(host, port, self._answer, kind, _SilentHandler)
        except OSError as exc:
            raise SettingsError(
                f"LAYERSTACK_WORKER_METRICS_PORT={port}: {host}:{port} cannot be listened on ({exc.strerror})"
            ) from exc
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._stop = stop
        logger.info("metrics are at http://%s:%d/metrics", host, port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop()

    def show(self, presence: Callable[[], WorkerPresence]) -> None:
        """Show what a worker has counted as well, and that it is ready.

        Args:
            presence: tells what it is and has counted, whenever somebody asks.
        """
        self._registry.register(_Worker(presence))
        self._loaded = True

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path not in {"/health", "/ready"}:
            page: Iterable[bytes] = self._metrics(environ, start_response)
            return page
        is_loading = path == "/ready" and not self._loaded
        status = HTTPStatus.SERVICE_UNAVAILABLE if is_loading else HTTPStatus.OK
        start_response(f"{status} {status.phrase}", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"the encoder is being loaded\n" if is_loading else b"ok\n"]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the standard library
        """Log nothing."""


class _Worker(Collector):
    def __init__(self, presence: Callable[[], WorkerPresence]) -> None:
        self._presence = presence

    def collect(self) -> Iterable[Metric]:
        return worker_families([self._presence()])


def _by_name(counts: dict[Priority, int]) -> dict[str, int]:
    return {priority.name.lower(): number for priority, number in counts.items()}
