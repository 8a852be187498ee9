"""One request's way from HTTP through the queue to the engine: its id in log lines, and OpenTelemetry spans.

Without an endpoint for them, spans are those of opentelemetry-api, which do nothing.

The context travels in the headers of Celery's messages, put there by hand. opentelemetry-instrumentation-celery keeps
the spans of a process by task id, and our chunks may be delivered twice under one id; and it does not end the span of a
message whose task the sender does not know, as the API knows none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import structlog
from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind

from jobs.errors import SettingsError

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_REQUEST_ID = "request_id"


def is_on() -> bool:
    """Tell whether spans are wanted: an endpoint for them is set in the environment."""
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    return _endpoint() is not None and not off


def set_up(role: str) -> None:
    """Send the spans of this process to the endpoint that the environment names, if any.

    Args:
        role: `api` or `worker`; the service is named `layerstack-api` or `layerstack-worker`, unless
            `OTEL_SERVICE_NAME` is set.

    Raises:
        SettingsError: an endpoint is set, and the packages of the extra `tracing` are not installed.
    """
    if not is_on():
        return
    try:
        from jobs import spanexport  # noqa: PLC0415 - its packages are there only with the extra
    except ImportError as exc:
        raise SettingsError(
            f"{_endpoint()} is set, and traces need the extra `tracing`: pip install 'layerstack[tracing]' ({exc})"
        ) from exc
    spanexport.export(f"layerstack-{role}")


@contextmanager
def sending(task: str, queue: str) -> Iterator[dict[str, str]]:
    """Open a span around the sending of a task's message -> headers for it: the trace, and the id of the request."""
    attributes = {"messaging.system": "celery", "messaging.destination.name": queue}
    with _tracer().start_as_current_span(f"send {task}", kind=SpanKind.PRODUCER, attributes=attributes):
        request_id = structlog.contextvars.get_contextvars().get(_REQUEST_ID)
        headers = {} if request_id is None else {_REQUEST_ID: str(request_id)}
        propagate.inject(headers)
        yield headers


@contextmanager
def working(task: str, headers: Mapping[str, str] | None) -> Iterator[None]:
    """Open a span around the work on a task, in the trace of its message; log lines tell the id of its request.

    Args:
        task: its name.
        headers: those of `sending`, if the message has them.
    """
    carried = headers or {}
    with (
        _tracer().start_as_current_span(
            f"run {task}",
            propagate.extract(carried),
            kind=SpanKind.CONSUMER,
            attributes={"messaging.system": "celery"},
        ),
        about(**{name: value for name, value in carried.items() if name == _REQUEST_ID}),
    ):
        yield


@contextmanager
def about(**fields: str | int) -> Iterator[None]:
    """Have the log lines within tell `fields`, and the span at hand as well."""
    trace.get_current_span().set_attributes({f"layerstack.{name}": value for name, value in fields.items()})
    with structlog.contextvars.bound_contextvars(**fields):
        yield


@contextmanager
def within(name: str, **attributes: int) -> Iterator[Span]:
    """Open a span for a part of the work at hand; its attributes get `layerstack.` before their names."""
    named = {f"layerstack.{attribute}": value for attribute, value in attributes.items()}
    with _tracer().start_as_current_span(name, attributes=named) as span:
        yield span


def _tracer() -> trace.Tracer:
    return trace.get_tracer("layerstack")


def _endpoint() -> str | None:
    return next((name for name in _ENDPOINTS if os.environ.get(name)), None)
