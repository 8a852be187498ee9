"""The whole stack on one machine: a broker, a worker and the API as child processes, stopped in order.

If this process is killed, Linux ends the children too; elsewhere they go on and have to be ended by hand.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self

import httpx
from filelock import FileLock, Timeout

from jobs.settings import DEMO_MODEL, Settings
from layerstack.broker import broker_command
from layerstack.errors import LocalStackError

_POLL_S = 0.2
_BROKER_START_S = 10.0
# API, worker and broker one after the other, then they are killed.
_STOP_S = {"api": 3.0, "worker": 5.0, "broker": 1.0}
_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # looked up before any fork


@dataclass(frozen=True)
class _Child:
    name: str
    process: subprocess.Popen[bytes]


class LocalStack:
    """The child processes of `layerstack up`; use as a context manager.

    Attributes:
        url: where the API answers.
    """

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._say = say
        self._storage = Path(settings.storage).expanduser().resolve()
        self._children: list[_Child] = []
        self._resources = ExitStack()
        self.url = _url(settings.host, settings.port)
        # A proxy that the environment names is not for this machine.
        self._http = httpx.Client(base_url=self.url, timeout=0.5, trust_env=False)

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def run(self, stop: StopRequest) -> None:
        """Wait until `stop` has been asked for.

        Raises:
            LocalStackError: a child ended by itself.
        """
        announced = False
        while not stop.asked:
            time.sleep(_POLL_S)
            for child in self._children:
                if (code := child.process.poll()) is not None and not stop.asked:
                    raise LocalStackError(f"the {child.name} ended with exit code {code}; its messages are above")
            if not announced and self._is_ready():
                self._say(f"ready: {self.url}")
                announced = True

    def stop(self) -> None:
        """End the children in the reverse order of need, and free what they held."""
        for name, limit in _STOP_S.items():
            for child in [child for child in self._children if child.name == name]:
                _end(child.process, limit)
        self._children.clear()
        self._resources.close()
        self._http.close()

    def _start(self) -> None:
        _check_port(self._settings.host, self._settings.port)
        self._lock_storage()
        # A path for a unix socket has about 100 characters at the most: it cannot live in the storage.
        private = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="layerstack-")))
        broker_socket = private / "broker.sock"
        broker_folder = self._storage / "broker"
        broker_folder.mkdir(exist_ok=True)
        self._spawn("broker", broker_command(broker_folder, broker_socket), os.environ.copy())
        environment = self._environment(broker_socket)
        self._spawn("api", [sys.executable, "-m", "api"], environment)
        _wait_for_socket(broker_socket, self._children[0].process, broker_folder / "broker.log")
        self._spawn("worker", [sys.executable, "-m", "worker"], environment)

    def _environment(self, broker_socket: Path) -> dict[str, str]:
        """Return the children's environment: ours, with the settings that this stack decides."""
        return os.environ | {
            "LAYERSTACK_BROKER_URL": f"unix://{broker_socket}",
            "LAYERSTACK_REPLY_URL": "",
            "LAYERSTACK_STORAGE": str(self._storage),
            "LAYERSTACK_HOST": self._settings.host,
            "LAYERSTACK_PORT": str(self._settings.port),
            "LAYERSTACK_MODEL": self._settings.model or DEMO_MODEL,
            "LAYERSTACK_PRESET": self._settings.preset,
            # An empty variable is one that is not set.
            "LAYERSTACK_DEVICE": self._settings.device or "",
            "LAYERSTACK_DTYPE": self._settings.dtype or "",
            "LAYERSTACK_ATTENTION": self._settings.attention,
        }

    def _spawn(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        # A session of its own: Ctrl-C in a terminal reaches this process alone, which then stops the others in order.
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - one system call, which takes no lock
        )
        self._children.append(_Child(name, process))

    def _lock_storage(self) -> None:
        try:
            self._storage.mkdir(parents=True, exist_ok=True)
            self._resources.enter_context(FileLock(self._storage / "up.lock", timeout=0))
        except Timeout as exc:
            raise LocalStackError(f"{self._storage} is in use by another `layerstack up`") from exc
        except OSError as exc:
            raise LocalStackError(f"the storage {self._storage} cannot be used: {exc}") from exc

    def _is_ready(self) -> bool:
        try:
            return self._http.get("/ready").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False


class StopRequest:
    """Whether SIGINT or SIGTERM has come since this was made.

    A plain flag: an Event's lock could be held by the very code that the signal interrupts.
    """

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGINT, self._ask)
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True


def _url(host: str, port: int) -> str:
    """Return where a server on `host` answers this machine."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - told apart, not listened on
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise LocalStackError(
                f"{host}:{port} cannot be listened on ({exc.strerror}); choose another --port"
            ) from exc


def _wait_for_socket(path: Path, broker: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _BROKER_START_S
    while time.monotonic() < deadline and broker.poll() is None:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                time.sleep(_POLL_S / 2)
            else:
                return
    raise LocalStackError(f"the broker does not start; {log} says why")


def _end(process: subprocess.Popen[bytes], limit_s: float) -> None:
    process.terminate()
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _die_with_parent() -> None:
    """Ask Linux to end this child with its parent, so that not even SIGKILL leaves anything running."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)
