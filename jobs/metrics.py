"""Prometheus metrics of workers, as a worker itself and the API, which knows of all of them, show them."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Info, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jobs.records import WorkerCounters, WorkerPresence

_COUNTERS = {
    "prompts": "Prompts that went through a forward.",
    "rows": "Token rows that went through a forward.",
    "capacity": "Token rows that the forwards had room for.",
    "batches": "Forwards that succeeded.",
    "tokenize_seconds": "Seconds spent tokenizing.",
    "queue_seconds": "Seconds that prompts waited for their forward, summed over prompts.",
    "encode_seconds": "Seconds spent in forwards.",
    "out_of_memory": "Forwards that ran out of memory and were tried again, halved.",
    "failed_prompts": "Prompts that failed on their own.",
    "dropped_prompts": "Prompts that were cancelled, expired or handed back before they reached the device.",
    "written_parts": "Parts written.",
    "written_rows": "Rows of the parts written.",
    "written_bytes": "Bytes of the parts written.",
}
_GAUGES = {
    "token_budget": "Token rows of a forward; for a while smaller after running out of memory.",
    "waiting_rows": "Token rows of the prompts that are not on the device yet.",
}
_BY_PRIORITY = {
    "waiting_prompts": "Prompts that are not on the device yet.",
    "batches_waited": "The most forwards that began between a prompt's submission and its own, since the start.",
}
_UNITS = {"capacity": "capacity_rows", "token_budget": "token_budget_rows"}


def new_registry() -> CollectorRegistry:
    """Return a registry with what every process tells: its version, and its memory, CPU time and open files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    build = Info("layerstack_build", "Version of this process.", registry=registry)
    build.info({"version": version("layerstack"), "python": platform.python_version()})
    return registry


def worker_families(workers: Iterable[WorkerPresence]) -> list[Metric]:
    """Return the metrics of workers: `layerstack_worker_*`, labelled with the end of the worker's id."""
    there = [(worker.worker_id[-8:], worker) for worker in workers]
    counted = [(label, worker.counters) for label, worker in there if worker.counters is not None]
    return [*_about(there), *_counted(counted)]


def _about(workers: Sequence[tuple[str, WorkerPresence]]) -> Iterable[Metric]:
    info = GaugeMetricFamily(
        "layerstack_worker_info",
        "Workers that have loaded their encoder.",
        labels=["worker", "host", "model", "dtype", "device", "fingerprint"],
    )
    started = GaugeMetricFamily(
        "layerstack_worker_start_time_seconds", "When the worker had loaded its encoder.", labels=["worker"]
    )
    for label, worker in workers:
        encoder = worker.encoder
        info.add_metric([label, worker.host, encoder.model, encoder.dtype, encoder.device, encoder.fingerprint], 1)
        started.add_metric([label], worker.started_at.timestamp())
    return [info, started]


def _counted(workers: Sequence[tuple[str, WorkerCounters]]) -> Iterable[Metric]:
    for name, text in _COUNTERS.items():
        counter = CounterMetricFamily(_named(name), text, labels=["worker"])
        for label, counters in workers:
            counter.add_metric([label], getattr(counters, name))
        yield counter
    for name, text in _GAUGES.items():
        gauge = GaugeMetricFamily(_named(name), text, labels=["worker"])
        for label, counters in workers:
            gauge.add_metric([label], getattr(counters, name))
        yield gauge
    for name, text in _BY_PRIORITY.items():
        gauge = GaugeMetricFamily(_named(name), text, labels=["worker", "priority"])
        for label, counters in workers:
            for priority, value in getattr(counters, name).items():
                gauge.add_metric([label, priority], value)
        yield gauge
    fill = GaugeMetricFamily(_named("fill_ratio"), "Share of their room that the forwards filled.", labels=["worker"])
    for label, counters in workers:
        fill.add_metric([label], counters.rows / counters.capacity if counters.capacity else 0.0)
    yield fill


def _named(name: str) -> str:
    return f"layerstack_worker_{_UNITS.get(name, name)}"
