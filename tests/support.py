"""What tests do with processes and ports."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

START_S = 60.0
KEY = "ls_of-ann"
"""The key of `keyed_url`."""


def clean_environment() -> dict[str, str]:
    """The environment without settings that the developer may have."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LAYERSTACK_")}


def setting_of(variable: str) -> str:
    """The field of `Settings` that an environment variable sets, if there is one."""
    return variable.removeprefix("LAYERSTACK_").lower()


def layerstack_command() -> str:
    return str(Path(sys.executable).parent / "layerstack")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def can_connect(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def status_of(url: str) -> int | None:
    """HTTP status of a GET, or None if nobody answers."""
    try:
        return httpx.get(url, timeout=10).status_code
    except httpx.TransportError:
        return None


def kind(response: httpx.Response) -> tuple[int, str]:
    """Status and type of a problem document."""
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == response.status_code
    return response.status_code, response.json()["type"].removeprefix("urn:layerstack:problem:")


def wait_for(condition: Callable[[], object], process: subprocess.Popen | None = None, log: Path | None = None) -> None:
    """Poll until `condition` holds; fails if `process` ends before, or after a minute."""
    deadline = time.monotonic() + START_S
    while not condition():
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > deadline:
            pytest.fail(log.read_text() if log else "waited in vain")
        time.sleep(0.05)


@dataclass(frozen=True)
class Stack:
    """A running `layerstack up`."""

    url: str
    storage: Path
    process: subprocess.Popen

    def http(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **options)


@contextmanager
def local_stack(folder: Path, *options: str, **settings: object) -> Iterator[Stack]:
    """Run `layerstack up` in `folder` until it is ready, with more words for its command line, and settings."""
    port = free_port()
    stack_url, storage, log = f"http://127.0.0.1:{port}", folder / "storage", folder / "log"
    command = [layerstack_command(), "up", "--port", str(port), "--storage", str(storage), *options]
    environment = clean_environment() | {f"LAYERSTACK_{name.upper()}": str(value) for name, value in settings.items()}
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        try:
            wait_for(lambda: status_of(f"{stack_url}/ready") == 200, process, log)
            yield Stack(stack_url, storage, process)
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 0, log.read_text()


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let this process write no file longer than `size`, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
