"""What the routes use: made once by the lifespan, reached through named dependencies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

from celery import Celery
from fastapi import Depends, Request
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from api.admission import Admission
from api.encoders import LiveEncoders
from api.formats import Renderer
from api.metrics import Metrics
from api.predictor import Predictor
from jobs.queue import make_celery
from jobs.settings import Settings
from jobs.store import JobStore

_SOCKET_TIMEOUT_S = 5.0
# Commands take a millisecond: as many connections are plenty, and whoever finds none waits.
_CONNECTIONS = 100


@dataclass(frozen=True)
class Services:
    """Connections and stores of one API process."""

    settings: Settings
    store: JobStore
    celery: Celery
    redis: Redis
    encoders: LiveEncoders
    predictor: Predictor
    renderer: Renderer
    metrics: Metrics


@asynccontextmanager
async def open_services(settings: Settings, store: JobStore, metrics: Metrics) -> AsyncIterator[Services]:
    """Open what the routes use, and close it at the end. Nothing connects before it is needed."""
    redis = _connect(settings.broker_url.get_secret_value(), _CONNECTIONS)
    # Whoever waits for a reply has a connection to himself.
    reply_redis = _connect(settings.effective_reply_url, settings.predict_queue_max)
    celery = make_celery(settings)
    encoders = LiveEncoders(redis)
    try:
        yield Services(
            settings=settings,
            store=store,
            celery=celery,
            redis=redis,
            encoders=encoders,
            metrics=metrics,
            predictor=Predictor(
                celery=celery,
                redis=redis,
                reply_redis=reply_redis,
                encoders=encoders,
                admission=Admission(redis, settings.predict_queue_max, settings.predict_timeout_s),
                timeout_s=settings.predict_timeout_s,
            ),
            renderer=Renderer(),
        )
    finally:
        await redis.aclose()
        await reply_redis.aclose()
        celery.close()


def _connect(url: str, max_connections: int) -> Redis:
    # The default waits and tries again for longer than any caller likes to wait for a 503; and a broker that hangs must
    # not be asked twice, as redis-py does on a unix socket, whose handshake reports a timeout as a lost connection.
    # What a restarted broker has left dead is seen when it is taken from the pool.
    never = Retry(NoBackoff(), 0)
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=_SOCKET_TIMEOUT_S,
        socket_timeout=_SOCKET_TIMEOUT_S,
        socket_connect_timeout=_SOCKET_TIMEOUT_S,
        retry=never,
    )
    return Redis.from_pool(pool)


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]
