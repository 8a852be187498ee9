"""A page to try the interface out, with nothing from another server."""

from __future__ import annotations

from pathlib import Path

import fastapi_offline
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles

from api.access import DOCS_PATH
from api.securityheaders import page_policy

router = APIRouter(include_in_schema=False)
_STATIC = f"{DOCS_PATH}/static"


@router.get(DOCS_PATH)
@router.head(DOCS_PATH)
async def docs(request: Request) -> Response:
    """Return Swagger UI on our OpenAPI document."""
    page = get_swagger_ui_html(
        openapi_url=request.app.openapi_url,
        title=request.app.title,
        swagger_js_url=f"{_STATIC}/swagger-ui-bundle.js",
        swagger_css_url=f"{_STATIC}/swagger-ui.css",
        swagger_favicon_url=f"{_STATIC}/favicon.png",
        swagger_ui_parameters={"validatorUrl": None},  # else it asks a server of its makers
    )
    page.headers["Content-Security-Policy"] = page_policy(bytes(page.body).decode())
    return page


def install(app: FastAPI) -> None:
    """Add the page and its scripts."""
    app.mount(_STATIC, StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static"))
    app.include_router(router)
