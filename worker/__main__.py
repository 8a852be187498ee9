"""`python -m worker`: the worker process, with its settings from `LAYERSTACK_*` variables."""

from __future__ import annotations

import sys

from jobs.process import begin


def main() -> int:
    """Run the worker; returns the exit code."""
    settings = begin("worker")
    # torch takes seconds to import: a bad setting is told before that.
    from worker.service import run  # noqa: PLC0415

    return run(settings)


if __name__ == "__main__":
    sys.exit(main())
