"""The whole stack on one machine: a broker, a worker and the API as child processes, stopped in order.

A child that dies is started again; `layerstack/supervision.py` says when. One that hangs is left alone.

If this process is killed, Linux asks the children to end, too, and only one that hangs outlives it; elsewhere they go
on and have to be ended by hand.
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
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Self

import httpx
from filelock import FileLock, Timeout

from jobs.loopback import check_exposure
from jobs.settings import Settings
from layerstack.broker import broker_command, forget_workers
from layerstack.errors import LocalStackError
from layerstack.supervision import Restarts, describe_end

_POLL_S = 0.2
_BROKER_START_S = 10.0
# API, worker and broker one after the other, then they are killed.
_STOP_S = {"api": 3.0, "worker": 5.0, "broker": 1.0}
_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # looked up before any fork


@dataclass
class _Child:
    """A command that is to run as long as the stack does; `process` is None while it waits to be started."""

    name: str
    command: list[str]
    environment: dict[str, str]
    reason: str  # where it says why it ended
    process: subprocess.Popen[bytes] | None = None
    restarts: Restarts = field(default_factory=Restarts)


class LocalStack:
    """The child processes of `layerstack up`; use as a context manager.

    Attributes:
        url: where the API answers.
        storage: where the jobs are kept: a folder's full path, or a URL.
    """

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._say = say
        self._folder = settings.local_folder
        self._children: list[_Child] = []
        self._resources = ExitStack()
        self._was_ready = False  # at any time
        self._announced = False  # that it is ready, since the last death
        self.url = _url(settings.host, settings.port)
        self.storage = _resolved(settings.storage)
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
        """Keep the children alive until `stop` has been asked for.

        Raises:
            LocalStackError: a child cannot start, in a stack that was never ready.
        """
        while not stop.asked:
            for child in self._children:
                if child.process is None:
                    self._start_if_due(child)
                elif (code := child.process.poll()) is not None and not stop.asked:
                    self._lost(child, code, describe_end(code))
            if not self._announced and self._is_ready():
                self._say(f"ready: {self.url}")
                self._announced = self._was_ready = True
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """End the children in the reverse order of need, and free what they held."""
        for name, limit in _STOP_S.items():
            for process in [child.process for child in self._children if child.name == name]:
                if process is not None:
                    _end(process, limit)
        self._children.clear()
        self._resources.close()
        self._http.close()

    def _start(self) -> None:
        check_exposure(self._settings)
        _check_port(self._settings.host, self._settings.port)
        self._lock_folder()
        # A path for a unix socket has about 100 characters at the most: it cannot live in a folder that users name.
        private = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="layerstack-")))
        self._socket = private / "broker.sock"
        folder = self._folder / "broker"
        folder.mkdir(exist_ok=True)
        log = folder / "broker.log"
        ours = self._environment()
        broker = _Child("broker", broker_command(folder, self._socket), os.environ.copy(), f"{log} says why")
        api = _Child("api", [sys.executable, "-m", "api"], ours, "its messages are above")
        worker = _Child("worker", [sys.executable, "-m", "worker"], ours, "its messages are above")
        self._children = [broker, api, worker]
        self._spawn(broker)
        self._spawn(api)
        self._wait_for_broker(broker)

    def _environment(self) -> dict[str, str]:
        """Return the children's environment: ours, with the settings that this stack decides."""
        return os.environ | {
            "LAYERSTACK_BROKER_URL": f"unix://{self._socket}",
            "LAYERSTACK_REPLY_URL": f"unix://{self._socket}",
            "LAYERSTACK_STORAGE": self.storage,
            "LAYERSTACK_LOCAL_DIR": str(self._folder),
            "LAYERSTACK_HOST": self._settings.host,
            "LAYERSTACK_PORT": str(self._settings.port),
            "LAYERSTACK_MODEL": self._settings.model or "",
            "LAYERSTACK_PRESET": self._settings.preset,
            # An empty variable is one that is not set.
            "LAYERSTACK_DEVICE": self._settings.device or "",
            "LAYERSTACK_DTYPE": self._settings.dtype or "",
            "LAYERSTACK_ATTENTION": self._settings.attention,
        }

    def _start_if_due(self, child: _Child) -> None:
        if not child.restarts.is_due(time.monotonic()):
            return
        # A worker that was killed could not sign off, and /ready would go on counting it as loaded.
        if child.name == "worker" and not forget_workers(self._socket):
            return  # until the broker answers
        self._spawn(child)

    def _spawn(self, child: _Child) -> None:
        child.restarts.started(time.monotonic())
        try:
            # A session of its own: Ctrl-C in a terminal reaches this process alone, which then stops the others in
            # order.
            child.process = subprocess.Popen(
                child.command,
                env=child.environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - one system call, which takes no lock
            )
        except OSError as exc:  # out of memory or of processes, say, which passes
            if not self._was_ready:
                raise
            self._lost(child, 1, f"cannot be started ({exc.strerror})")

    def _lost(self, child: _Child, code: int, how: str) -> None:
        """Plan the next start of a child that does not run any more, and say so."""
        wait_s = child.restarts.died(code, time.monotonic(), was_ready=self._was_ready)
        if wait_s is None:
            raise LocalStackError(f"the {child.name} {how}; {child.reason}")
        child.process = None
        self._announced = False
        self._say(f"the {child.name} {how}; starting it again in {wait_s:g} s")

    def _wait_for_broker(self, broker: _Child) -> None:
        """Wait until the broker can be connected to, or is dead."""
        deadline = time.monotonic() + _BROKER_START_S
        while broker.process is not None and broker.process.poll() is None and not _can_connect(self._socket):
            if time.monotonic() > deadline:
                raise LocalStackError(f"the broker does not start; {broker.reason}")
            time.sleep(_POLL_S / 2)

    def _lock_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._resources.enter_context(FileLock(self._folder / "up.lock", timeout=0))
        except Timeout as exc:
            other = "LAYERSTACK_LOCAL_DIR" if "://" in self.storage else "--storage"
            raise LocalStackError(
                f"{self._folder} is in use by another `layerstack up`; choose another {other}"
            ) from exc
        except OSError as exc:
            raise LocalStackError(f"the folder {self._folder} cannot be used: {exc}") from exc

    def _is_ready(self) -> bool:
        if any(child.process is None for child in self._children):
            return False
        try:
            return self._http.get("/ready").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False


class StopRequest:
    """Whether SIGINT, SIGTERM or SIGHUP has come since this was made.

    A terminal that is closed sends SIGHUP; who was started with `nohup` ignores it, and goes on. A plain flag: an
    Event's lock could be held by the very code that the signal interrupts.
    """

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGINT, self._ask)
        signal.signal(signal.SIGTERM, self._ask)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True


def _url(host: str, port: int) -> str:
    """Return where a server on `host` answers this machine."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - told apart, not listened on
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _resolved(storage: str) -> str:
    """Return `storage` so that it means the same in any working directory."""
    return storage if "://" in storage else str(Path(storage).expanduser().resolve())


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise LocalStackError(
                f"{host}:{port} cannot be listened on ({exc.strerror}); choose another --port"
            ) from exc


def _can_connect(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _end(process: subprocess.Popen[bytes], limit_s: float) -> None:
    process.terminate()
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _die_with_parent() -> None:
    """Ask Linux to send this child SIGTERM when its parent dies, of SIGKILL too; one that hangs outlives it."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)
