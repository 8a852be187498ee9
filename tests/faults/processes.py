"""Processes that can be killed, frozen, limited and started again."""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
STOP_S = 60.0
_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # looked up before any fork


class Child:
    """A process of the stack. What it writes goes to one log file, however often it is started.

    The log goes through a pipe, so that the process can be kept from writing files and still tell of it.
    """

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.name, self.log = name, log
        self._command, self._environment = command, environment
        self._process: subprocess.Popen | None = None
        self._pump: threading.Thread | None = None
        self._log_start = 0
        self.ended_on_purpose = False

    def start(self) -> None:
        assert not self.alive
        self.ended_on_purpose = False
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self._process = subprocess.Popen(
            self._command,
            cwd=REPOSITORY,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            restore_signals=False,  # Python ignores SIGXFSZ, and so do its children: a limited file is an error, no end
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - one system call, which takes no lock
        )
        self._pump = threading.Thread(target=self._write_log, args=(self._process.stdout,), daemon=True)
        self._pump.start()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def said(self, line_end: str) -> bool:
        """Whether it has logged a line with this end since it was started last."""
        if not self.log.exists():
            return False
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return line_end.encode() + b"\n" in file.read()

    def kill(self) -> None:
        self.ended_on_purpose = True
        self._process.kill()
        self._wait()

    def terminate(self) -> int:
        """Send SIGTERM, and return the exit code."""
        self.ended_on_purpose = True
        self._process.terminate()
        return self._wait()

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def limit_files(self, size: int | None) -> None:
        """Let each write behind byte `size` of a file fail, as on a storage that is full. None takes that back."""
        _, hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (hard if size is None else size, hard))

    def tail(self, lines: int = 40) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        told = [line for line in text.splitlines() if "api.access" not in line]
        return f"--- {self.name}, the end of {self.log}\n" + "\n".join(told[-lines:])

    def _wait(self) -> int:
        try:
            code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise AssertionError(f"{self.name} does not end\n{self.tail()}") from None
        self._pump.join()
        return code

    def _write_log(self, pipe) -> None:
        with pipe, self.log.open("ab", buffering=0) as log:
            while piece := os.read(pipe.fileno(), 65536):
                log.write(piece)


def _die_with_parent() -> None:
    """Ask Linux to end this child with the thread that started it, which is the main one: nothing outlives a test."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)
