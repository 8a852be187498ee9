"""`python -m api`: the HTTP server, with its settings from `LAYERSTACK_*` variables."""

from __future__ import annotations

import logging
import sys

import uvicorn

from api.app import create_app
from jobs.errors import SettingsError
from jobs.loopback import check_exposure, is_loopback
from jobs.process import begin

logger = logging.getLogger(__name__)
# Answers under way get this long at shutdown; whoever still waits for a worker then is cut off.
_GRACE_S = 2
# Of a request line with its headers, and of trailers. httptools, which uvicorn would take, holds whatever comes.
_MAX_HEAD_BYTES = 2**16


def main() -> int:
    """Run the server; returns the exit code."""
    settings = begin("api")
    try:
        check_exposure(settings)
        app = create_app(settings)
    except SettingsError as exc:
        sys.exit(str(exc))
    if settings.api_keys is None and not is_loopback(settings.reachable_on):
        logger.warning(
            "reachable on %s without keys: whoever reaches this port can use the encoder", settings.reachable_on
        )
    # uvicorn raises the signal that stopped it once more at the end; what `begin` set up makes that exit code 0.
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        http="h11",
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        ws="none",
        log_config=None,
        access_log=False,  # ours tell how long a request took, and its id
        timeout_graceful_shutdown=_GRACE_S,
        server_header=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
