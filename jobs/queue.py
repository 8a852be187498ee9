"""The queue: Celery on Redis, with names and settings that api and worker share.

A message carries only what to do, never results: those are in the job's files. docs/celery.md gives the reasons for
the settings, and says what Redis can lose.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import cast

from celery import Celery
from kombu import Exchange, Queue
from redis import Redis

from jobs import tracing
from jobs.messages import ChunkMessage, PredictMessage
from jobs.settings import Settings

INTERACTIVE = "interactive"
BULK = "bulk"
PREDICT_TASK = "layerstack.predict"
CHUNK_TASK = "layerstack.encode_chunk"

# kombu's own: delivery tag -> message, exchange and key; delivery tag -> when it was delivered.
_UNACKED, _UNACKED_INDEX = "unacked", "unacked_index"


def make_celery(settings: Settings) -> Celery:
    """Return a Celery app for the broker of `settings`; it connects on first use."""
    app = Celery("layerstack", broker=_broker_url(settings), set_as_current=False)
    app.conf.update(
        # Each with an exchange of its own: Celery would bind both to the default exchange under the same key.
        task_queues=[Queue(name, Exchange(name), routing_key=name) for name in (INTERACTIVE, BULK)],
        task_default_queue=BULK,
        task_create_missing_queues=False,
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=True,  # a message lives until the part is written
        task_acks_on_failure_or_timeout=True,  # failures go to the job's own ledger, not round in circles
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,  # threads cannot be cancelled
        worker_soft_shutdown_timeout=0,
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,  # nothing here uses it, and it polls
        worker_send_task_events=settings.task_events,
        broker_connection_timeout=5,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # never give up
        broker_channel_error_retry=True,  # nor on a broker that answers, but takes nothing: its memory or disk is full
        broker_transport_options={
            "visibility_timeout": settings.visibility_timeout_s,
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            "queue_order_strategy": "priority",
            "health_check_interval": 10,
            "socket_timeout": 15,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
        },
    )
    return app


def publish_predict(app: Celery, message: PredictMessage) -> None:
    """Ask a worker for an answer now.

    Raises:
        kombu.exceptions.OperationalError: the broker does not answer.
    """
    kwargs = {"message": message.model_dump(mode="json")}
    with tracing.sending(PREDICT_TASK, INTERACTIVE) as headers:
        # Without `kwargsrepr`, Celery would write the prompts into the headers as well, for logs.
        app.send_task(
            PREDICT_TASK, kwargs=kwargs, kwargsrepr="message", queue=INTERACTIVE, retry=False, headers=headers
        )


def publish_chunks(app: Celery, messages: Iterable[ChunkMessage]) -> None:
    """Ask workers for chunks of a job, over one connection.

    Raises:
        kombu.exceptions.OperationalError: the broker does not answer.
    """
    with app.producer_pool.acquire(block=True) as producer:
        for message in messages:
            app.send_task(
                CHUNK_TASK,
                kwargs={"message": message.model_dump(mode="json")},
                queue=BULK,
                task_id=_task_id(message.job_id, message.chunk),
                retry=False,
                producer=producer,
            )


def waiting_chunks(redis: Redis, *, delivered_within_s: float = 0.0) -> set[tuple[str, int]]:
    """Return job and chunk of all messages in the bulk queue, and of those that a worker has just taken.

    A worker takes a few messages before it has a thread for them. Whether it still lives, only time tells.

    Raises:
        redis.exceptions.RedisError: the broker does not answer.
    """
    messages = [json.loads(content) for content in cast("list[bytes]", redis.lrange(BULK, 0, -1))]
    since = time.time() - delivered_within_s
    tags = cast("list[bytes]", redis.zrangebyscore(_UNACKED_INDEX, since, "+inf"))
    taken = cast("list[bytes | None]", redis.hmget(_UNACKED, tags)) if tags else []
    messages += [json.loads(content)[0] for content in taken if content is not None]
    task_ids = (message["headers"]["id"].partition("/") for message in messages)
    return {(job_id, int(chunk)) for job_id, separator, chunk in task_ids if separator}


def _task_id(job_id: str, chunk: int) -> str:
    """Return what Celery calls a chunk's task, so that it can be told from the message alone."""
    return f"{job_id}/{chunk}"


def _broker_url(settings: Settings) -> str:
    """Translate the URL: redis-py calls a unix socket `unix://`, kombu `redis+socket://`."""
    url = settings.broker_url.get_secret_value()
    return "redis+socket://" + url.removeprefix("unix://") if url.startswith("unix://") else url
