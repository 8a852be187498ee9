"""`python -m api`: the HTTP server, with its settings from `LAYERSTACK_*` variables."""

from __future__ import annotations

import ipaddress
import logging
import sys

import uvicorn

from api.app import create_app
from jobs.errors import SettingsError
from jobs.process import begin

logger = logging.getLogger(__name__)
# Answers under way get this long at shutdown; whoever still waits for a worker then is cut off.
_GRACE_S = 2


def main() -> int:
    """Run the server; returns the exit code."""
    settings = begin("api")
    if not _is_loopback(settings.host):
        logger.warning("listening on %s: whoever reaches this port can use the encoder", settings.host)
    try:
        app = create_app(settings)
    except SettingsError as exc:
        sys.exit(str(exc))
    # uvicorn raises the signal that stopped it once more at the end; what `begin` set up makes that exit code 0.
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        timeout_graceful_shutdown=_GRACE_S,
        server_header=False,
    )
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
