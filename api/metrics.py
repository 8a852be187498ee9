"""What the API counts, and what it knows of workers and jobs, for Prometheus."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import Literal, cast

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from redis.asyncio import Redis
from redis.exceptions import RedisError

from api.encoders import LiveEncoders
from api.problems import Unavailable
from jobs import keys
from jobs.metrics import new_registry, worker_families
from jobs.queue import BULK, INTERACTIVE
from jobs.records import WorkerPresence

Refusal = Literal["queue-full", "no-worker", "no-answer", "disconnected", "bad-prompt", "failed"]
"""Why a `/predict` got no embeddings."""

logger = logging.getLogger(__name__)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
# Prometheus gives a scrape 10 s: without the broker, the rest is told in time.
_BROKER_TIMEOUT_S = 3.0
_QUEUES = (INTERACTIVE, BULK)


class Metrics:
    """The counters of one API process, in a registry of their own.

    Attributes:
        registry: all of them.
        in_progress: gauge of HTTP requests that are being answered.
        requests: counter by `method`, `route` and `status`.
        durations: histogram of seconds by `method` and `route`.
        sent_bytes: counter by `method` and `route`, of bodies as they are sent.
    """

    def __init__(self) -> None:
        registry = self.registry = new_registry()
        labels = ("method", "route")
        self.requests = Counter("layerstack_http_requests", "HTTP requests.", (*labels, "status"), registry=registry)
        self.durations = Histogram(
            "layerstack_http_request_duration_seconds",
            "Seconds from a request to the end of its answer.",
            labels,
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_progress = Gauge(
            "layerstack_http_requests_in_progress", "HTTP requests that are being answered.", registry=registry
        )
        self.sent_bytes = Counter(
            "layerstack_http_sent_bytes", "Bytes of the bodies of answers, as they are sent.", labels, registry=registry
        )
        self._predicts = Counter(
            "layerstack_predict_requests", "/predict requests by what came of them.", ("outcome",), registry=registry
        )
        self._predict_prompts = Counter("layerstack_predict_prompts", "Prompts answered.", registry=registry)
        self._predict_tokens = Counter(
            "layerstack_predict_tokens", "Tokens of the prompts answered, prefix included.", registry=registry
        )
        self._queue_seconds = Histogram(
            "layerstack_predict_queue_seconds",
            "Seconds of an answered /predict outside of the encoder: in the queue and on the way.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._encode_seconds = Histogram(
            "layerstack_predict_encode_seconds",
            "Seconds of an answered /predict in the encoder, waiting for its forward included.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._jobs = Counter("layerstack_jobs_accepted", "Jobs accepted.", registry=registry)
        self._job_prompts = Counter(
            "layerstack_jobs_accepted_prompts", "Prompts of the jobs accepted.", registry=registry
        )

    def predicted(self, queue_s: float, encode_s: float, num_prompts: int, num_tokens: int) -> None:
        """Count a `/predict` that was answered.

        Args:
            queue_s: seconds outside of the encoder.
            encode_s: seconds in the encoder.
            num_prompts: of the request.
            num_tokens: of all its prompts, prefix included.
        """
        self._predicts.labels("answered").inc()
        self._queue_seconds.observe(queue_s)
        self._encode_seconds.observe(encode_s)
        self._predict_prompts.inc(num_prompts)
        self._predict_tokens.inc(num_tokens)

    def refused(self, reason: Refusal) -> None:
        """Count a `/predict` that got no embeddings."""
        self._predicts.labels(reason).inc()

    def accepted(self, num_prompts: int) -> None:
        """Count a job that was stored."""
        self._jobs.inc()
        self._job_prompts.inc(num_prompts)

    async def scrape(self, redis: Redis, encoders: LiveEncoders) -> Collector:
        """Return everything there is to tell now; without the broker, what this process knows itself."""
        return _Everything(self, await _shared(redis, encoders))


class _Everything(Collector):
    def __init__(self, metrics: Metrics, shared: list[Metric]) -> None:
        self._metrics = metrics
        self._shared = shared

    def collect(self) -> Iterable[Metric]:
        yield from self._metrics.registry.collect()
        yield from self._shared


async def _shared(redis: Redis, encoders: LiveEncoders) -> list[Metric]:
    """Return what all API processes of a broker tell alike: whether it answers, its workers, its jobs."""
    is_up = GaugeMetricFamily("layerstack_broker_up", "Whether the broker answers.")
    try:
        async with asyncio.timeout(_BROKER_TIMEOUT_S):
            async with redis.pipeline(transaction=False) as pipe:
                pipe.hgetall(keys.JOB_COUNTS)
                pipe.zcount(keys.PREDICT_WAITING, time.time(), "+inf")
                for queue in _QUEUES:
                    pipe.llen(queue)
                found = await pipe.execute()
            workers = await _workers(encoders)
    except (RedisError, TimeoutError) as exc:
        logger.warning("metrics of workers and jobs are missing, the broker does not answer: %s", exc)
        is_up.add_metric([], 0)
        return [is_up]
    is_up.add_metric([], 1)
    counts, waiting, *lengths = cast("tuple[dict[bytes, bytes], int, int, int]", tuple(found))
    jobs = GaugeMetricFamily("layerstack_jobs", "Jobs in the storage, by status.", labels=["status"])
    for status, number in sorted(counts.items()):
        jobs.add_metric([status.decode()], int(number))
    requests = GaugeMetricFamily("layerstack_predict_waiting", "/predict requests that wait, of all servers.")
    requests.add_metric([], waiting)
    messages = GaugeMetricFamily(
        "layerstack_queue_messages", "Messages in the queue that no worker has taken yet.", labels=["queue"]
    )
    for queue, length in zip(_QUEUES, lengths, strict=True):
        messages.add_metric([queue], length)
    return [is_up, jobs, requests, messages, *worker_families(workers)]


async def _workers(encoders: LiveEncoders) -> list[WorkerPresence]:
    try:
        return await encoders.workers()
    except Unavailable:
        return []
