"""Who may call: bearer keys, each with a name that owns its jobs."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from api.problems import Problem, respond

DOCS_PATH = "/docs"
_OPEN = frozenset({"/", "/health", "/ready", "/openapi.json", DOCS_PATH})


def is_open(path: str) -> bool:
    """Tell whether reading a path needs no key, and is not counted: it tells nothing of jobs."""
    return path in _OPEN or path.startswith(f"{DOCS_PATH}/")


def reads_openly(scope: Scope) -> bool:
    """Tell whether a request needs no key, and is not counted."""
    return scope["method"] in {"GET", "HEAD"} and is_open(scope["path"])


class KeyCheck:
    """ASGI middleware: a call without one of the keys is answered with 401, before its body is read.

    It leaves the name of the key for `owner`. Every call takes the same comparisons, whatever it presents.

    Args:
        app: what is behind it.
        keys: name -> SHA-256 in hexadecimal; None lets everybody in.
    """

    def __init__(self, app: ASGIApp, keys: Mapping[str, str] | None) -> None:
        self.app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Look at the Authorization header."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = None
        if self._keys is not None and not reads_openly(scope):
            presented = _presented(scope)
            name = _name_of(presented, self._keys)
            if name is None:
                await respond(_unauthorized(presented))(scope, receive, send)
                return
        scope.setdefault("state", {})["owner"] = name
        await self.app(scope, receive, send)


def _presented(scope: Scope) -> bytes:
    """Return the bearer key of a request, empty if there is none."""
    value = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, key = value.partition(b" ")
    return bytes(key.strip()) if scheme.lower() == b"bearer" else b""


def _name_of(presented: bytes, keys: Mapping[str, str]) -> str | None:
    digest = hashlib.sha256(presented).hexdigest()
    # A list, so that no comparison is left out once one has matched.
    names = [name for name, known in keys.items() if hmac.compare_digest(known, digest)]
    return names[0] if names and presented else None


def _unauthorized(presented: bytes) -> Problem:
    detail = "this is no key of this server" if presented else "this needs a key, as `Authorization: Bearer KEY`"
    return Problem(
        "unauthorized", f"Authorization: {detail}", headers={"WWW-Authenticate": "Bearer"}, field="Authorization"
    )


def owner(request: Request) -> str | None:
    """Return the name of the caller's key; None on a server without keys."""
    name: str | None = request.state.owner
    return name


OwnerDep = Annotated[str | None, Depends(owner)]


def describe_keys(document: dict[str, Any]) -> None:
    """Add to an OpenAPI document which calls need a key."""
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values() if not is_open(path) else ():
            operation["security"] = [{"key": []}]
