"""`python -m worker`: the worker process, with its settings from `LAYERSTACK_*` variables."""

from __future__ import annotations

import signal
import sys

from jobs import logs
from jobs.errors import SettingsError
from jobs.settings import load_settings


def main() -> int:
    """Run the worker; returns the exit code."""
    # As long as there is nothing to finish, a signal ends the process at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: sys.exit(0))
    try:
        settings = load_settings()
    except SettingsError as exc:
        print(exc, file=sys.stderr)
        return 1
    logs.set_up("worker", settings.log_level)
    # torch takes seconds to import: a bad setting is told before that.
    from worker.service import run  # noqa: PLC0415

    return run(settings)


if __name__ == "__main__":
    sys.exit(main())
