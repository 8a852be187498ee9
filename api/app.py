"""The FastAPI application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from api import openapi, problems
from api.access import KeyCheck
from api.jobrequest import JobRequest
from api.limits import BodyLimit
from api.metrics import Metrics
from api.observer import Observer, is_probe
from api.origins import Cors, OriginCheck, check_origins
from api.ratelimit import RateLimit, RateLimits, parse_limits
from api.requestids import REQUEST_IDS
from api.routes import docs, events, jobs, predict, results, service
from api.securityheaders import SecurityHeaders
from api.services import open_services
from jobs.settings import Settings, load_settings
from jobs.storage import open_storage
from jobs.store import JobStore


class _Application(FastAPI):
    """FastAPI, with an OpenAPI document that is complete, and middlewares around everything.

    Args:
        settings: of the server.
        around: middlewares that see every answer, also that to an unexpected error; the outermost first.
        options: FastAPI's own.
    """

    def __init__(self, settings: Settings, around: Sequence[Middleware], **options: Any) -> None:  # noqa: ANN401 - FastAPI's
        super().__init__(**options)
        self._settings = settings
        self._around = around
        self._is_described = False

    def build_middleware_stack(self) -> ASGIApp:
        """Wrap what Starlette builds, which answers unexpected errors itself, outside of all that was added to it."""
        stack = super().build_middleware_stack()
        for middleware in reversed(self._around):
            stack = middleware.cls(stack, *middleware.args, **middleware.kwargs)
        return stack

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document."""
        document = super().openapi()
        if not self._is_described:  # FastAPI makes the document once
            openapi.complete(document, self._settings, [JobRequest, *predict.MODELS, *results.MODELS])
            self._is_described = True
        return document


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application; connections open with its lifespan.

    Raises:
        SettingsError: a setting has a bad value.
    """
    chosen = settings or load_settings()
    store = JobStore(open_storage(chosen.storage))
    metrics = Metrics()
    rate_limits = parse_limits(chosen.rate_limit)
    origins = check_origins(chosen.cors_origins)
    cors = [Middleware(Cors, origins=origins)] if origins else []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(chosen, store, metrics) as services:
            app.state.services = services
            app.state.rate_limits = RateLimits(services.redis, rate_limits)
            yield

    app = _Application(
        chosen,
        around=[REQUEST_IDS, Middleware(Observer, metrics=metrics), Middleware(SecurityHeaders), *cors],
        title="layerstack",
        version=service.VERSION,
        description="Prompts in, FLUX.2 text conditioning out.",
        docs_url=None,  # its scripts are those of another server, as are those of redoc
        redoc_url=None,
        redirect_slashes=False,  # by `Host`, and without TLS, where a proxy has taken that off
        lifespan=lifespan,
        telemetry=TelemetryConfig(metrics=False, logs=False, operation_spans=False, exclude=is_probe),
    )
    problems.install(app)
    # The last one added sees a request first.
    app.add_middleware(BodyLimit, json_max_bytes=chosen.body_max_bytes, upload_max_bytes=chosen.upload_max_bytes)
    if rate_limits:
        app.add_middleware(RateLimit)
    app.add_middleware(KeyCheck, keys=chosen.api_keys)
    if chosen.api_keys is None:
        hosts = None if chosen.allow_without_keys else chosen.allowed_hosts or ()
        app.add_middleware(OriginCheck, origins=origins, hosts=hosts)
    app.include_router(predict.router)
    app.include_router(jobs.router)
    app.include_router(results.router)
    app.include_router(events.router)
    app.include_router(service.router)
    docs.install(app)
    return app
