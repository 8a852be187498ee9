"""Log lines of api and worker: the standard library's records, written by structlog for people or for programs."""

from __future__ import annotations

import logging
import sys
import threading
from types import TracebackType
from typing import Literal

import structlog
from opentelemetry import trace
from structlog.dev import Column, ConsoleRenderer, KeyValueColumnFormatter, plain_traceback
from structlog.typing import EventDict, Processor, WrappedLogger

Format = Literal["console", "json"]

_OURS = ("api", "encoder", "jobs", "worker", "uvicorn.error")
# Of a record only these: libraries put arguments of their own there, prompts among them.
_EXTRA_FIELDS = ("client", "method", "path", "route", "status", "duration_s", "sent_bytes")
_FIRST = ("timestamp", "level", "role", "logger", "event")

logger = logging.getLogger(__name__)


def set_up(role: str, level: str, log_format: Format) -> None:
    """Write log lines of `level` to standard error, those of libraries only from WARNING on.

    What `structlog.contextvars` holds is in each line as well.

    Args:
        role: name of this process in each line.
        level: DEBUG, INFO, WARNING or ERROR.
        log_format: `console` for people, `json` for one object a line.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_formatter(role, log_format))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    # Celery warns with a traceback of every message that goes back to the queue; our own line says why it does.
    logging.getLogger("celery.app.trace").setLevel(logging.ERROR)
    if log_format == "json":
        logging.captureWarnings(capture=True)
        sys.excepthook = _log_uncaught
        threading.excepthook = _log_uncaught_in_thread


def _formatter(role: str, log_format: Format) -> logging.Formatter:
    def add_role(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {**event, "role": role}

    def first(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {**{name: event[name] for name in _FIRST}, **event}

    always: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        add_role,
        _add_trace_id,
    ]
    chosen: list[Processor] = (
        [
            structlog.stdlib.ExtraAdder(_EXTRA_FIELDS),
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            first,
            structlog.processors.JSONRenderer(),
        ]
        if log_format == "json"
        else [
            _add_upper_level,
            structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S.%f", utc=False),
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            _drop_repeats,
            _console(),
        ]
    )
    return structlog.stdlib.ProcessorFormatter(processors=[*chosen], foreign_pre_chain=always)


def _console() -> ConsoleRenderer:
    """Return what writes `timestamp LEVEL role logger: event`, then what else is known."""

    def bare(width: int = 0, postfix: str = "") -> KeyValueColumnFormatter:
        return KeyValueColumnFormatter(
            key_style=None, value_style="", reset_style="", value_repr=str, width=width, postfix=postfix
        )

    named = KeyValueColumnFormatter(key_style="", value_style="", reset_style="", value_repr=str)
    return ConsoleRenderer(
        columns=[
            Column("timestamp", bare()),
            Column("level", bare(width=7)),
            Column("role", bare()),
            Column("logger", bare(postfix=":")),
            Column("event", bare()),
            Column("", named),
        ],
        exception_formatter=plain_traceback,
    )


def _add_upper_level(_logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    return {**event, "level": method.upper()}


def _drop_repeats(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Leave out the ids that a person reads in the line anyway."""
    if str(event.get("job_id")) in event["event"]:
        return {name: value for name, value in event.items() if name not in {"job_id", "chunk"}}
    return event


def _add_trace_id(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    span = trace.get_current_span().get_span_context()
    return {**event, "trace_id": trace.format_trace_id(span.trace_id)} if span.is_valid else event


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    logger.critical("uncaught: %s", error, exc_info=(kind, error, traceback))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        name = None if args.thread is None else args.thread.name
        logger.critical(
            "uncaught in thread %s: %s",
            name,
            args.exc_value,
            exc_info=(args.exc_type, args.exc_value, args.exc_traceback),
        )
