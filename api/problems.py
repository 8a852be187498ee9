"""Every error that a client sees: RFC 9457 problem documents. docs/api.md lists the types.

Problem                 any HTTP error with a stable type
├── Unavailable         503: broker or worker is not there
└── (others are made where they are found, by one of the functions below)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from http import HTTPStatus
from itertools import islice
from typing import Any

import orjson
from asgi_correlation_id import correlation_id
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from api.media_types import essence
from api.problemtypes import STATUS_OF
from jobs.errors import (
    JobNotFoundError,
    JobStateError,
    NoPromptsError,
    NotEnoughSpaceError,
    PartNotFoundError,
    PartNotReadyError,
    RecordFormatError,
    ResultsExpiredError,
    StorageError,
    StorageFullError,
)

logger = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 5
_SHOWN_CHARS = 200
_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")


class Problem(HTTPException):
    """An HTTP error that says what is wrong, with which field, and what the limit is.

    Args:
        kind: stable last word of the problem's type, such as `too-many-prompts`; it has its HTTP status.
        detail: one sentence for the person who reads it.
        headers: to send along.
        members: further members of the document, such as `field` and `limit`.
    """

    def __init__(self, kind: str, detail: str, *, headers: Mapping[str, str] | None = None, **members: object) -> None:
        super().__init__(STATUS_OF[kind], detail, headers=dict(headers) if headers else None)
        self.kind = kind
        self.members = members


class Unavailable(Problem):
    """503: what is needed is not there now, and may be soon."""

    def __init__(self, kind: str, detail: str, **members: object) -> None:
        super().__init__(kind, detail, headers={"Retry-After": str(RETRY_AFTER_S)}, **members)


def invalid(field: str, value: object, reason: str, *, limit: int | None = None) -> Problem:
    """Return a 422 for one field; what is shown of the value is cut to a readable length."""
    shown = shorten(value)
    members: dict[str, Any] = {} if limit is None else {"limit": limit}
    return Problem("invalid-request", f"{field}: {reason}; got {shown}", field=field, value=shown, **members)


def invalid_all(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """Return a 422 for what pydantic found wrong."""
    listed = [_describe(error) for error in errors[:20]]
    detail = "; ".join(f"{each['field']}: {each['message']}; got {each['value']}" for each in listed[:3])
    return Problem("invalid-request", detail, field=listed[0]["field"], errors=listed)


def first_unknown_only(value: object, known: Collection[str]) -> object:
    """Return an object without its unknown fields but one; pydantic makes an error of each, and one will do."""
    if not isinstance(value, dict):
        return value
    unknown = islice((name for name in value if name not in known), 1)
    return {name: value[name] for name in (*known, *unknown) if name in value}


def _describe(error: Mapping[str, Any]) -> dict[str, str]:
    place = [part for part in error["loc"] if part != "body"]
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "json_invalid":
        # FastAPI names the character where the JSON breaks as if it were a field; pydantic has it in the message.
        characters = [f" (character {part})" for part in place if isinstance(part, int)]
        message = f"not valid JSON: {error['ctx']['error']}{''.join(characters)}"
        place = [part for part in place if not isinstance(part, int)]
    field = ".".join(map(str, place)) or "body"
    return {"field": field, "message": message, "value": shorten(error.get("input"))}


def shorten(value: object) -> str:
    """Return a value as it may be shown in an error."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"


def install(app: FastAPI) -> None:
    """Turn every error of `app` into a problem document."""
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(JobNotFoundError, _job_not_found)
    app.add_exception_handler(PartNotFoundError, _part_not_found)
    app.add_exception_handler(PartNotReadyError, _part_not_ready)
    app.add_exception_handler(ResultsExpiredError, _results_expired)
    app.add_exception_handler(RecordFormatError, _job_damaged)
    app.add_exception_handler(JobStateError, _job_state)
    app.add_exception_handler(NoPromptsError, _no_prompts)
    app.add_exception_handler(NotEnoughSpaceError, _not_enough_space)
    app.add_exception_handler(StorageError, _storage_down)
    app.add_exception_handler(RedisError, _broker_down)
    app.add_exception_handler(OperationalError, _broker_down)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(Exception, _unexpected)


def respond(problem: Problem) -> Response:
    """Return the document of `problem`."""
    document = {
        "type": f"urn:layerstack:problem:{problem.kind}",
        "title": HTTPStatus(problem.status_code).phrase,
        "status": problem.status_code,
        "detail": problem.detail,
        **problem.members,
    }
    if problem.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR and (request_id := correlation_id.get()):
        document["request_id"] = request_id  # by which the log lines are found
    return Response(_as_json(document), problem.status_code, problem.headers, MEDIA_TYPE)


def _as_json(document: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(document)
    except TypeError:  # half a surrogate pair, from a file's name, say: UTF-8 has none
        return json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")


async def _http_error(request: Request, exc: Exception) -> Response:
    if isinstance(exc, Problem):
        return respond(exc)
    if not isinstance(exc, HTTPException):
        raise exc
    if exc.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(_allowed_methods(request) or ("GET", "HEAD"))  # none are known of a folder of files
        detail = f"{request.method} is not for this path; allowed: {allowed}"
        return respond(Problem("method-not-allowed", detail, headers={"Allow": allowed}))
    kind = {HTTPStatus.BAD_REQUEST: "http-error", HTTPStatus.NOT_FOUND: "not-found"}.get(HTTPStatus(exc.status_code))
    if kind is None:
        raise exc
    return respond(Problem(kind, exc.detail, headers=exc.headers))


def _allowed_methods(request: Request) -> list[str]:
    """Return the methods of all routes to a path; Starlette tells those of the first."""
    return [
        method
        for method in _METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


async def _validation_error(request: Request, exc: Exception) -> Response:
    media_type = request.headers.get("content-type", "")
    kind = essence(media_type)
    is_json = kind.startswith("application/") and kind.endswith(("/json", "+json"))
    if request.method == "POST" and not is_json:
        detail = f"Content-Type: this needs application/json; got {shorten(media_type)}"
        return respond(Problem("unsupported-media-type", detail, field="Content-Type"))
    return respond(invalid_all(exc.errors() if isinstance(exc, RequestValidationError) else []))


async def _job_not_found(_request: Request, exc: Exception) -> Response:
    return respond(Problem("job-not-found", str(exc)))


async def _part_not_found(_request: Request, exc: Exception) -> Response:
    return respond(Problem("part-not-found", str(exc)))


async def _part_not_ready(_request: Request, exc: Exception) -> Response:
    return respond(Problem("not-there-yet", str(exc)))


async def _results_expired(_request: Request, exc: Exception) -> Response:
    return respond(Problem("results-expired", str(exc)))


async def _job_damaged(_request: Request, exc: Exception) -> Response:
    logger.error("a job cannot be read: %s", exc)
    return respond(Problem("job-damaged", "a file of the job cannot be read; the server's log says which and why"))


async def _job_state(_request: Request, exc: Exception) -> Response:
    return respond(Problem("job-state", str(exc)))


async def _not_enough_space(_request: Request, exc: Exception) -> Response:
    members: dict[str, Any] = (
        {"needed": exc.needed_bytes, "limit": exc.room_bytes} if isinstance(exc, NotEnoughSpaceError) else {}
    )
    return respond(Problem("not-enough-space", f"prompts: {exc}", field="prompts", **members))


async def _storage_down(_request: Request, exc: Exception) -> Response:
    logger.warning("the storage failed: %s", exc)
    if isinstance(exc, StorageFullError):
        return respond(Problem("storage-full", "the storage is full"))
    return respond(Unavailable("storage-unavailable", "the storage does not work; the server's log says why"))


async def _no_prompts(_request: Request, exc: Exception) -> Response:
    return respond(Problem("invalid-request", f"prompts: {exc}", field="prompts"))


async def _broker_down(_request: Request, exc: Exception) -> Response:
    logger.warning("the broker does not answer: %s", exc)
    return respond(Unavailable("broker-unavailable", "the broker does not answer"))


async def _client_gone(_request: Request, _exc: Exception) -> Response:
    logger.info("a client went away before its body had arrived")
    return respond(Problem("client-disconnected", "the body did not arrive whole"))


async def _unexpected(_request: Request, _exc: Exception) -> Response:
    # Starlette logs the exception itself; the client learns nothing of the inside.
    return respond(Problem("internal-error", "the server failed; its log says why"))
