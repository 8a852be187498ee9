"""The FastAPI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from api import problems
from api.jobrequest import JobRequest
from api.limits import BodyLimit
from api.routes import jobs, predict, service
from api.services import open_services
from jobs.settings import Settings, load_settings
from jobs.storage import open_storage
from jobs.store import JobStore


class _Application(FastAPI):
    """FastAPI, with the schemas of bodies that routes read by themselves."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document."""
        document = super().openapi()
        if "JobRequest" in document["components"]["schemas"]:  # FastAPI makes the document once
            return document
        schema = JobRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        document["components"]["schemas"] |= {**schema.pop("$defs"), "JobRequest": schema}
        return document


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application; connections open with its lifespan.

    Raises:
        SettingsError: a setting has a bad value.
    """
    chosen = settings or load_settings()
    store = JobStore(open_storage(chosen.storage))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(chosen, store) as services:
            app.state.services = services
            yield

    app = _Application(
        title="layerstack",
        version=service.VERSION,
        description="Prompts in, FLUX.2 text conditioning out.",
        lifespan=lifespan,
    )
    problems.install(app)
    app.add_middleware(BodyLimit, json_max_bytes=chosen.body_max_bytes, upload_max_bytes=chosen.upload_max_bytes)
    app.include_router(predict.router)
    app.include_router(jobs.router)
    app.include_router(service.router)
    return app
