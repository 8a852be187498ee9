"""What the routes use: made once by the lifespan, reached through named dependencies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

from celery import Celery
from fastapi import Depends, Request
from redis.asyncio import Redis

from api.encoders import LiveEncoders
from api.predictor import Predictor
from jobs.queue import make_celery
from jobs.settings import Settings
from jobs.store import JobStore

_SOCKET_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Services:
    """Connections and stores of one API process."""

    settings: Settings
    store: JobStore
    celery: Celery
    redis: Redis
    encoders: LiveEncoders
    predictor: Predictor


@asynccontextmanager
async def open_services(settings: Settings, store: JobStore) -> AsyncIterator[Services]:
    """Open what the routes use, and close it at the end. Nothing connects before it is needed."""
    url = settings.broker_url.get_secret_value()
    redis = Redis.from_url(url, socket_timeout=_SOCKET_TIMEOUT_S, socket_connect_timeout=_SOCKET_TIMEOUT_S)
    # Waits for a reply as long as a request may take, so it cannot have a socket timeout of its own.
    reply_redis = Redis.from_url(
        settings.effective_reply_url, socket_timeout=None, socket_connect_timeout=_SOCKET_TIMEOUT_S
    )
    celery = make_celery(settings)
    encoders = LiveEncoders(redis)
    try:
        yield Services(
            settings=settings,
            store=store,
            celery=celery,
            redis=redis,
            encoders=encoders,
            predictor=Predictor(celery, reply_redis, encoders, settings.predict_timeout_s),
        )
    finally:
        await redis.aclose()
        await reply_redis.aclose()
        celery.close()


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]
