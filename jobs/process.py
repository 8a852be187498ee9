"""How api and worker begin."""

from __future__ import annotations

import os
import signal
import sys

from jobs import logs, tracing
from jobs.errors import SettingsError
from jobs.settings import Settings, load_settings


def begin(role: str) -> Settings:
    """Read the settings and set up log lines, traces and signals; the first thing that a process of ours does.

    From here on SIGTERM and SIGINT end the process at once with exit code 0, until it has something to finish and sets
    handlers of its own.

    Args:
        role: name of this process in each log line.

    Raises:
        SystemExit: a setting is bad; its message goes to standard error, and the exit code is 1.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        # Not by `sys.exit`: while torch is loading, its threads turn that into an abort now and then.
        signal.signal(number, lambda _number, _frame: os._exit(0))
    try:
        settings = load_settings()
        logs.set_up(role, settings.log_level, settings.log_format)
        tracing.set_up(role)
    except SettingsError as exc:
        sys.exit(str(exc))
    return settings
