"""What a worker counts, and its own `/metrics`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Self

from prometheus_client import start_http_server
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from encoder import Engine, Priority
from jobs.errors import SettingsError
from jobs.metrics import new_registry, worker_families
from jobs.records import PartSummary, WorkerCounters, WorkerPresence

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

    Args:
        host: address to listen on.
        port: to listen on.

    Raises:
        SettingsError: the address cannot be listened on.
    """

    def __init__(self, host: str, port: int | None) -> None:
        self._registry = new_registry()
        self._stop: Callable[[], None] = lambda: None
        if port is None:
            return
        try:
            server, thread = start_http_server(port, host, self._registry)
        except OSError as exc:
            raise SettingsError(
                f"LAYERSTACK_WORKER_METRICS_PORT={port}: {host}:{port} cannot be listened on ({exc.strerror})"
            ) from exc

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
        """Show what a worker has counted as well.

        Args:
            presence: tells what it is and has counted, whenever somebody asks.
        """
        self._registry.register(_Worker(presence))


class _Worker(Collector):
    def __init__(self, presence: Callable[[], WorkerPresence]) -> None:
        self._presence = presence

    def collect(self) -> Iterable[Metric]:
        return worker_families([self._presence()])


def _by_name(counts: dict[Priority, int]) -> dict[str, int]:
    return {priority.name.lower(): number for priority, number in counts.items()}
