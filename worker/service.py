"""The worker process: one encoder, and Celery threads around it.

Two Celery apps run in this process, because the choice of queues is per app: jobs cannot take the slots of
interactive requests, so those wait for the batch that is running, never for a chunk.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import Any

from celery import Celery
from celery.worker import WorkController
from celery.worker import state as celery_state
from kombu.asynchronous import set_event_loop
from redis import Redis

from encoder import Encoder, EncoderError, Engine
from jobs.errors import SettingsError, StorageError
from jobs.queue import BULK, INTERACTIVE, make_celery
from jobs.settings import Settings
from jobs.storage import open_storage
from jobs.store import JobStore
from worker.chunks import ChunkEncoder
from worker.credit import CreditBack
from worker.housekeeping import Housekeeper
from worker.leases import Leases
from worker.metrics import MetricsServer, Written, count
from worker.model import load_encoder
from worker.notes import JobNotes
from worker.presence import Presence
from worker.recall import Recall
from worker.reconciler import Reconciler
from worker.tasks import Tasks
from worker.turns import Turns
from worker.withdrawals import Withdrawals

logger = logging.getLogger(__name__)
_SOCKET_TIMEOUT_S = 15.0
_POLL_S = 0.1
# For answers that are nearly there, when the worker stops. `layerstack up` waits 5 s, an orchestrator often 10 s.
_LAST_ANSWERS_S = 2.0
_CELERY_STATE: Any = celery_state  # its stubs know only of None, where an exit code belongs


def run(settings: Settings) -> int:
    """Load the encoder and work until SIGTERM or SIGINT.

    Returns:
        The exit code: 0 after a signal, 1 if the worker cannot start or its consumers end by themselves.
    """
    try:
        store = JobStore(open_storage(settings.storage))
        store.storage.check()
        metrics = MetricsServer(settings.worker_metrics_host, settings.worker_metrics_port)
    except SettingsError as exc:
        logger.error("%s", exc)  # noqa: TRY400 - the message says it all
        return 1
    except StorageError as exc:
        logger.error("LAYERSTACK_STORAGE=%r cannot be used: %s", settings.storage, exc)  # noqa: TRY400 - the message says it all
        return 1
    with metrics:
        return _work(settings, store, metrics)


def _work(settings: Settings, store: JobStore, metrics: MetricsServer) -> int:
    encoder = _load(settings)
    if encoder is None:
        return 1
    written = Written()
    stopping = threading.Event()
    redis = _connect(settings.broker_url.get_secret_value())
    with (
        Engine(encoder) as engine,
        Presence(redis, encoder, lambda: count(engine, written)) as presence,
        Leases(redis, settings.lease_s) as leases,
        Withdrawals(redis) as withdrawals,
    ):
        metrics.show(presence.now)
        notes = JobNotes(redis)
        recall = Recall(engine, settings.deduplicate_rows)
        tasks = Tasks(
            engine=engine,
            chunks=ChunkEncoder(store, engine, recall, settings.storage_reserve_bytes, written),
            leases=leases,
            notes=notes,
            reply_redis=_connect(settings.effective_reply_url),
            chunk_attempts=settings.chunk_attempts,
            chunk_crashes=settings.chunk_crashes,
            withdrawals=withdrawals,
            stopping=stopping,
            turns=Turns(),
        )
        reconciler = threading.Thread(
            target=_reconciler(settings, store, redis, notes, encoder.fingerprint, stopping).run, name="reconciler"
        )
        reconciler.start()
        try:
            return _consume(settings, tasks, engine, stopping)
        finally:
            stopping.set()
            reconciler.join()


def _reconciler(
    settings: Settings, store: JobStore, redis: Redis, notes: JobNotes, fingerprint: str, stopping: threading.Event
) -> Reconciler:
    hours = settings.retention_hours
    return Reconciler(
        store=store,
        redis=redis,
        app=make_celery(settings),
        notes=notes,
        housekeeper=Housekeeper(
            store,
            retention=None if hours is None else timedelta(hours=hours),
            abandoned_after=timedelta(seconds=settings.abandoned_after_s),
        ),
        fingerprint=fingerprint,
        slots=settings.bulk_threads,
        search_every_s=settings.reconcile_s,
        lease_s=settings.lease_s,
        chunk_crashes=settings.chunk_crashes,
        read_all=settings.verify_parts == "full",
        stopping=stopping,
    )


def _load(settings: Settings) -> Encoder | None:
    try:
        encoder = load_encoder(settings)
    except SettingsError as exc:
        logger.error("%s", exc)  # noqa: TRY400 - the message says it all
        return None
    except EncoderError as exc:
        logger.error("the encoder cannot be loaded: %s", exc)  # noqa: TRY400 - the message says it all
        return None
    logger.info(
        "loaded %s on %s, %s attention, fingerprint %s",
        encoder.model,
        encoder.device,
        encoder.attention,
        encoder.fingerprint,
    )
    if encoder.random_weights:
        logger.warning("%s is the demo checkpoint: its weights are RANDOM", encoder.model)
    return encoder


def _consume(settings: Settings, tasks: Tasks, engine: Engine, stopping: threading.Event) -> int:
    """Run both consumers until a signal, or until one of them or the device ends by itself."""
    consumers = [
        _consumer(settings, tasks, INTERACTIVE, settings.interactive_threads),
        _consumer(settings, tasks, BULK, settings.bulk_threads),
    ]
    _stop_on_signal()
    threads = [threading.Thread(target=consumer.start) for consumer in consumers]
    for thread in threads:
        thread.start()
    logger.info("ready")
    while _CELERY_STATE.should_stop is None and all(thread.is_alive() for thread in threads) and not engine.failed:
        time.sleep(_POLL_S)
    signalled = _CELERY_STATE.should_stop is not None
    stopping.set()
    _CELERY_STATE.should_stop = 0  # both consumers look at it, and end with this exit code
    leave_at = time.monotonic() + _LAST_ANSWERS_S
    for thread in threads:
        thread.join(max(0.0, leave_at - time.monotonic()))
    engine.close(finish=False)  # requests that have not reached the device go back to the queue
    for thread in threads:
        thread.join()
    logger.info("stopped")
    return 0 if signalled else 1


def _consumer(settings: Settings, tasks: Tasks, queue: str, concurrency: int) -> WorkController:
    app: Celery = make_celery(settings)
    tasks.register(app)
    app.steps["consumer"].add(CreditBack)
    # Pool threads look tasks up in the default app; both apps have the same ones, so either will do. Without it they
    # would ask an empty app, and Celery's thread pool keeps that error to itself.
    app.set_default()
    # kombu keeps the event loop in a global and would give both consumers the same one. Without a loop, a consumer
    # that is full looks again only after 2 s.
    set_event_loop(None)
    return app.WorkController(
        app=app,
        hostname=f"{queue}@{socket.gethostname()}",
        queues=[queue],
        concurrency=concurrency,
        pool_cls="threads",
        loglevel=settings.log_level,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=not settings.task_events,  # of those events; nothing else listens
    )


def _stop_on_signal() -> None:
    """Let SIGTERM and SIGINT end the consumers in order: chunks are handed back between two batches."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        # Only this: an Event's lock could be held by the very code that the signal interrupts.
        _CELERY_STATE.should_stop = 0

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _connect(url: str) -> Redis:
    return Redis.from_url(url, socket_timeout=_SOCKET_TIMEOUT_S, socket_connect_timeout=5)
