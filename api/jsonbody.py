"""JSON bodies: from bytes to a model, or to a problem that says what is wrong with them."""

from __future__ import annotations

import io
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from api.compressed import content_coding, expanded
from api.problems import Problem, invalid, invalid_all

MAX_JSON_DEPTH = 200
"""Objects and lists in each other that pydantic's parser reads at most."""
_SHOWN_BYTES = 200
_M = TypeVar("_M", bound=BaseModel)


def parse(model: type[_M], content: bytes, *, content_encoding: str | None, max_bytes: int) -> _M:
    """Return the model of a JSON body.

    Args:
        model: what the body should be.
        content: the body as it was sent.
        content_encoding: the header of that name.
        max_bytes: of the body, expanded.

    Raises:
        Problem: 413, 415 or 422; the body is too large, compressed in a way that we do not know, no JSON, or not what
            `model` says.
    """
    return validated(model, load(content, content_encoding=content_encoding, max_bytes=max_bytes))


def validated(model: type[_M], value: object) -> _M:
    """Return the model of what a JSON body holds.

    Raises:
        Problem: 422, it is not what `model` says.
    """
    try:
        return model.model_validate(value)
    except ValidationError as exc:
        raise invalid_all(exc.errors()) from exc


def load(content: bytes, *, content_encoding: str | None, max_bytes: int, field: str = "body") -> Any:  # noqa: ANN401 - JSON
    """Return what JSON says; see `parse`.

    Raises:
        Problem: 413, 415 or 422; it names `field`.
    """
    coding = content_coding(content_encoding)
    if coding is not None:
        content = expanded(io.BytesIO(content), coding, max_bytes=max_bytes, field=field).read()
    return load_text(content, field)


def load_text(content: str | bytes, field: str) -> Any:  # noqa: ANN401 - JSON
    """Return what JSON says.

    Raises:
        Problem: 422, it is no JSON, or nested too deeply; it names `field`.
    """
    try:
        return from_json(content)
    except ValueError as exc:
        if "recursion limit" in str(exc):
            detail = f"{field}: the JSON is nested too deeply, the limit is {MAX_JSON_DEPTH}"
            raise Problem("invalid-request", detail, field=field, limit=MAX_JSON_DEPTH) from exc
        raise invalid(field, content[:_SHOWN_BYTES], f"not valid JSON: {exc}") from exc
