"""Log lines of api and worker."""

from __future__ import annotations

import logging

_OURS = ("api", "encoder", "jobs", "worker", "uvicorn.error", "uvicorn.access")


class _NoProbes(logging.Filter):
    """Drops the access lines of health probes, which come every second and say nothing."""

    def filter(self, record: logging.LogRecord) -> bool:
        path = str(record.args[2]) if isinstance(record.args, tuple) and len(record.args) > 2 else ""  # noqa: PLR2004
        return path not in {"/health", "/ready"}


def set_up(role: str, level: str) -> None:
    """Write log lines of `level` to standard error, those of libraries only from WARNING on.

    Args:
        role: name of this process in each line.
        level: DEBUG, INFO, WARNING or ERROR.
    """
    logging.basicConfig(format=f"%(asctime)s %(levelname)-7s {role} %(name)s: %(message)s", level=logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    logging.getLogger("uvicorn.access").addFilter(_NoProbes())
    # Celery warns with a traceback of every message that goes back to the queue; our own line says why it does.
    logging.getLogger("celery.app.trace").setLevel(logging.ERROR)
