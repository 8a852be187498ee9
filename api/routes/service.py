"""What the service says of itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool

from api.problems import Problem, Unavailable
from api.securityheaders import page_policy
from api.services import Services, ServicesDep
from jobs.errors import StorageError
from jobs.records import EncoderInfo

router = APIRouter(tags=["service"])
logger = logging.getLogger(__name__)
VERSION = version("layerstack")
_PAGE = Path(__file__).parent.parent / "page.html"


class EncoderView(EncoderInfo):
    """The encoder that new work is for, and how many workers have loaded one."""

    num_workers: int
    shapes: dict[str, list[int | str]]


@router.get("/", response_class=JSONResponse)
@router.head("/", include_in_schema=False)
async def index(request: Request) -> Response:
    """Tell where things are: JSON for programs, a page with the jobs for a browser."""
    if "text/html" in request.headers.get("accept", ""):
        page = await run_in_threadpool(_PAGE.read_text, "utf-8")
        return HTMLResponse(page, headers={"Vary": "Accept", "Content-Security-Policy": page_policy(page)})
    links = {name: f"/{name}" for name in ("predict", "jobs", "encoder", "health", "ready", "metrics")}
    return JSONResponse(
        {"name": "layerstack", "version": VERSION, **links, "docs": "/docs", "openapi": "/openapi.json"},
        headers={"Vary": "Accept"},
    )


@router.get("/health")
@router.head("/health", include_in_schema=False)
async def health() -> dict[str, str]:
    """Tell that this process is alive; nothing more."""
    return {"status": "ok", "version": VERSION}


@router.get("/ready")
@router.head("/ready", include_in_schema=False)
async def ready(services: ServicesDep) -> dict[str, Any]:
    """Tell whether requests can be served: 503 until broker, storage and a loaded encoder answer."""
    checks = {
        "broker": await _check_broker(services),
        "storage": await _check_storage(services),
        "encoder": await _check_encoder(services),
    }
    if any(state != "ok" for state in checks.values()):
        missing = "; ".join(f"{name}: {state}" for name, state in checks.items() if state != "ok")
        raise Unavailable("not-ready", missing, checks=checks)
    return {"status": "ready", "checks": checks}


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={200: {"content": {"application/openmetrics-text": {}}, "description": "metrics for Prometheus"}},
)
async def metrics(request: Request, services: ServicesDep) -> Response:
    """Tell what this server, the workers and the jobs are doing, for Prometheus."""
    encode, media_type = _exposition(request.headers.get("accept", ""))
    found = await services.metrics.scrape(services.redis, services.encoders)
    content = await run_in_threadpool(encode, found)
    return Response(content, media_type=media_type, headers={"Vary": "Accept"})


@router.get("/encoder")
async def encoder(services: ServicesDep) -> EncoderView:
    """Describe the encoder: model, layers, shapes, fingerprint."""
    workers = await services.encoders.workers()
    info = workers[-1].encoder
    return EncoderView(
        **info.model_dump(),
        num_workers=len(workers),
        shapes={"prompt_embeds": ["B", info.max_length, info.embed_dim], "text_ids": ["B", info.max_length, 4]},
    )


def _exposition(accept: str) -> tuple[Callable[[Collector], bytes], str]:
    try:
        return choose_encoder(accept)
    except TypeError:  # prometheus_client compares a version that is no number
        return choose_encoder("")


async def _check_broker(services: Services) -> str:
    try:
        await services.redis.ping()
    except RedisError as exc:
        return f"does not answer ({type(exc).__name__})"
    return "ok"


async def _check_storage(services: Services) -> str:
    try:
        await run_in_threadpool(services.store.storage.check)
    except StorageError as exc:
        logger.warning("the storage cannot be used: %s", exc)  # names folders, or buckets; anybody may ask
        return "cannot be used; the server's log says why"
    return "ok"


async def _check_encoder(services: Services) -> str:
    try:
        await services.encoders.current()
    except Problem as exc:
        return exc.detail
    except RedisError:
        return "unknown without the broker"
    return "ok"
