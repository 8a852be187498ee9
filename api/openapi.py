"""The OpenAPI document: what FastAPI cannot tell from the routes. docs/api.md says the same in prose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from api.access import describe_keys, is_open
from api.problems import MEDIA_TYPE
from api.problemtypes import STATUS_OF
from jobs.settings import Settings

_SCHEMAS = "#/components/schemas/"
# Answers that FastAPI describes for every route with parameters, in its own form, which ours replace.
_OF_FASTAPI = ("HTTPValidationError", "ValidationError")
_ANYWHERE = ("internal-error", "broker-unavailable", "storage-unavailable")


class FieldError(BaseModel):
    """One thing that is wrong with a request."""

    field: str
    message: str
    value: str


class ProblemDocument(BaseModel):
    """An error, as RFC 9457 has it."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "example": {
                "type": "urn:layerstack:problem:too-many-prompts",
                "title": "Content Too Large",
                "status": 413,
                "detail": "prompt: 17 prompts, POST /predict takes at most 16; POST /jobs takes any number",
                "field": "prompt",
                "value": 17,
                "limit": 16,
                "see": "/jobs",
            }
        },
    )

    type: str = Field(pattern="^urn:layerstack:problem:[a-z-]+$", description="what went wrong; it never changes")
    title: str = Field(description="the name of the status")
    status: int
    detail: str = Field(description="for the person who reads it")
    field: str | None = Field(None, description="what is wrong with the request")
    value: str | int | float | None = Field(None, description="what it is, cut to a readable length")
    limit: int | float | str | None = None
    see: str | None = Field(None, description="a call that fits better")
    errors: list[FieldError] | None = None


def answers(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """Return the problems that a route may answer with, for FastAPI's `responses`; some come with every route."""
    by_status: dict[int, list[str]] = defaultdict(list)
    for kind in kinds:
        by_status[STATUS_OF[kind]].append(kind)
    return {status: _answer(some) for status, some in by_status.items()}


def body(content: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a route that reads it by itself, for FastAPI's `openapi_extra`."""
    return {"requestBody": {"required": True, "content": content}}


def reference(model: type[BaseModel]) -> dict[str, str]:
    """Return the schema of a model that `complete` is given."""
    return {"$ref": f"{_SCHEMAS}{model.__name__}"}


def complete(document: dict[str, Any], settings: Settings, models: Sequence[type[BaseModel]]) -> None:
    """Add to FastAPI's document what it does not know.

    Args:
        document: is changed.
        settings: decide which calls need a key, and which limits there are.
        models: that routes refer to with `reference`.
    """
    schemas = document["components"]["schemas"]
    for name in _OF_FASTAPI:
        schemas.pop(name, None)
    described: list[type[BaseModel]] = [ProblemDocument, *models]
    for model in described:
        schema = model.model_json_schema(ref_template=f"{_SCHEMAS}{{model}}")
        schemas |= {**schema.pop("$defs", {}), model.__name__: schema}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete_operation(operation, list(_common(path, method, settings)))
    if settings.api_keys is not None:
        describe_keys(document)


def _common(path: str, method: str, settings: Settings) -> Iterable[str]:
    """Return the problems that any route of this kind may answer with."""
    yield from _ANYWHERE
    if settings.api_keys is None:
        yield from ("host-not-allowed",) if method == "get" else ("host-not-allowed", "cross-origin")
    elif not is_open(path):
        yield "unauthorized"
    if settings.rate_limit is not None and not is_open(path):
        yield "rate-limited"
    if method == "post":
        yield from ("body-too-large", "client-disconnected")


def _complete_operation(operation: dict[str, Any], kinds: list[str]) -> None:
    responses = operation["responses"]
    if operation.get("parameters") or "422" in responses:
        kinds.append("invalid-request")
    # FastAPI's own text on 422 goes; ours says which problems it is.
    if MEDIA_TYPE not in responses.get("422", {}).get("content", {}):
        responses.pop("422", None)
    for status, found in answers(*kinds).items():
        known = responses.get(str(status))
        if known is None:
            responses[str(status)] = found
        elif found["description"] not in known["description"]:
            known["description"] += f"; {found['description']}"
            known.setdefault("content", {}).update(found["content"])


def _answer(kinds: Sequence[str]) -> dict[str, Any]:
    status = HTTPStatus(STATUS_OF[kinds[0]])
    found: dict[str, Any] = {
        "description": ", ".join(f"`{kind}`" for kind in kinds),
        "content": {MEDIA_TYPE: {"schema": reference(ProblemDocument)}},
    }
    if status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}:
        schema = {"type": "integer", "minimum": 1}
        found["headers"] = {"Retry-After": {"description": "seconds until it may go better", "schema": schema}}
    return found
