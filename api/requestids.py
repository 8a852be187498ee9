"""Ids of requests: taken from the caller, or made; they are in the answer and in the log lines."""

from __future__ import annotations

import re

from asgi_correlation_id import CorrelationIdMiddleware
from starlette.middleware import Middleware
from ulid import ULID

HEADER = "X-Request-ID"
_VALID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def is_valid(request_id: str) -> bool:
    """Tell whether a caller's id is taken over; any other could break a log line, and a new one is made."""
    return _VALID.fullmatch(request_id) is not None


def new_id() -> str:
    """Return a new id."""
    return str(ULID())


REQUEST_IDS = Middleware(
    CorrelationIdMiddleware, header_name=HEADER, generator=new_id, validator=is_valid, transformer=None
)
