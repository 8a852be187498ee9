"""`python -m worker`: the worker process, with its settings from `LAYERSTACK_*` variables."""

from __future__ import annotations

import logging
import sys

from jobs.errors import SettingsError
from jobs.settings import load_settings


def main() -> int:
    """Run the worker; returns the exit code."""
    try:
        settings = load_settings()
    except SettingsError as exc:
        print(exc, file=sys.stderr)
        return 1
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)-7s worker %(name)s: %(message)s")
    logging.getLogger("celery.redirected").setLevel(logging.WARNING)
    # torch takes seconds to import: a bad setting is told before that.
    from worker.service import run  # noqa: PLC0415

    return run(settings)


if __name__ == "__main__":
    sys.exit(main())
