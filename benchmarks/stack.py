"""`layerstack up` as a child process that benchmarks send work to over HTTP."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Self, cast

import httpx
import psutil
import torch

from benchmarks.measure import Cores, peak_resident_bytes, reset_peak, resident_bytes

_ROOT = Path(__file__).parents[1]
START_S = 600.0
STOP_S = 30.0
POLL_S = 0.5


@dataclass(frozen=True)
class Job:
    """A finished job: its time from sending the request to the manifest, that to the 202, and `Cores` meanwhile."""

    seconds: float
    accept_s: float
    manifest: dict[str, Any]
    cores: dict[str, float]


class Stack:
    """`layerstack up` as a child process, and what it is asked over HTTP; a context manager.

    Args:
        folder: for its storage and its log.
        checkpoint: of its encoder.
        device: of its encoder.
        options: more words for the command line.
        token_budget: rows of a forward; default the encoder's.

    Attributes:
        url: where it answers.
        processes: api, worker and broker.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Path,
        device: str,
        *,
        options: Sequence[str] = (),
        token_budget: int | None = None,
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "stack.log"
        self._command = [
            *_layerstack(),
            *("up", "--port", str(port), "--storage", str(folder / "storage"), "--model", str(checkpoint)),
            *("--device", device, *options),
        ]
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("LAYERSTACK_")} | {
            "LAYERSTACK_TOKEN_BUDGET": str(token_budget or ""),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            # The code beside this file, wherever an installed package would come from.
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
        }
        self._http = httpx.Client(base_url=self.url, timeout=START_S, trust_env=False)
        self.processes: dict[str, psutil.Process] = {}
        self._ready_bytes: dict[str, int] = {}

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._up = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)  # noqa: S603 - our own command, with no shell
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._http.close()
        self._up.terminate()
        try:
            self._up.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._up.kill()
            self._up.wait()

    def run(self, prompts: list[str], **options: object) -> Job:
        """Send a job of `prompts`, and return when its manifest is there."""
        cores = Cores(self.processes)
        started, job, accept_s = self.submit(prompts, **options)
        unfinished = started
        while not job["finished_at"]:
            time.sleep(POLL_S)
            asked = time.time()
            if not (job := self.get(f"/jobs/{job['id']}"))["finished_at"]:
                unfinished = asked
        used = cores.used()
        manifest = self.get(f"/jobs/{job['id']}/results") if job["status"] == "succeeded" else {}
        if manifest.get("succeeded") != len(prompts):
            raise SystemExit(f"the job did not succeed: {job}; the stack's log ends in\n{self._end_of_log()}")
        finished = datetime.fromisoformat(job["finished_at"]).timestamp()
        return Job(max(finished, unfinished) - started, accept_s, manifest, used)

    def submit(self, prompts: list[str], **options: object) -> tuple[float, dict[str, Any], float]:
        """Upload `prompts` -> when (seconds since the epoch), the job, seconds until it was accepted."""
        return self.upload("prompts.txt", "".join(f"{prompt}\n" for prompt in prompts).encode(), **options)

    def upload(self, name: str, content: bytes | IO[bytes], **options: object) -> tuple[float, dict[str, Any], float]:
        """Upload a prompt file, whose name tells its kind -> the same."""
        started, clock = time.time(), time.perf_counter()
        response = self._http.post("/jobs", files={"file": (name, content)}, data={"options": json.dumps(options)})
        accept_s = time.perf_counter() - clock
        if response.status_code != httpx.codes.ACCEPTED:
            raise SystemExit(f"POST /jobs answered {response.status_code}: {response.text}")
        return started, response.json(), accept_s

    def ask(self, method: str, path: str) -> None:
        """Send a request without a body, and drop what comes back."""
        self._http.request(method, path).raise_for_status()

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON at `path`."""
        return cast("dict[str, Any]", self._http.get(path).raise_for_status().json())

    def predict(self, prompt: str) -> bytes:
        """Ask for one prompt's embeddings -> a safetensors file."""
        answer = self._http.post("/predict", params={"format": "safetensors"}, json={"prompt": prompt})
        return answer.raise_for_status().content

    def latencies(self, prompts: list[str], pause_s: float, between: Callable[[], None]) -> list[float]:
        """Ask for one prompt after the other -> the seconds of each; `between` is called before each.

        The pauses are random: without them every request would come when the batch of the one before has just ended.
        """
        pauses = random.Random(0)
        found = []
        for prompt in prompts:
            between()
            time.sleep(pauses.uniform(0, pause_s))
            started = time.perf_counter()
            self.predict(prompt)
            found.append(time.perf_counter() - started)
        return found

    def memory_report(self) -> dict[str, int]:
        """Return the resident memory of each process: what it had when it was ready, and the highest since."""
        peaks = {name: peak_resident_bytes(process.pid) for name, process in self.processes.items()}
        return {f"{name}_ready_rss_mb": round(size / 1e6) for name, size in self._ready_bytes.items()} | {
            f"{name}_peak_rss_mb": round(size / 1e6) for name, size in peaks.items()
        }

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while not self._is_ready():
            if self._up.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the stack did not start; its log ends in\n{self._end_of_log()}")
            time.sleep(POLL_S)
        self.processes = {_role(child): child for child in psutil.Process(self._up.pid).children()}
        for name, process in self.processes.items():
            reset_peak(process.pid)  # loading may need more for a moment
            self._ready_bytes[name] = resident_bytes(process.pid)

    def _is_ready(self) -> bool:
        try:
            return self._http.get("/ready").is_success
        except httpx.TransportError:
            return False

    def _end_of_log(self) -> str:
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])


class BulkWork:
    """One job of `prompts` after the other, so that `reserve` prompts at least are always left; they may repeat."""

    def __init__(self, stack: Stack, prompts: list[str], reserve: int) -> None:
        self._stack, self._prompts, self._reserve = stack, prompts, reserve
        self._send()
        while not self._look()["num_done"]:
            time.sleep(POLL_S)

    def top_up(self) -> None:
        """Send another job if little is left of the last one."""
        if (left := len(self._prompts) - self._look()["num_done"]) < 1:
            raise SystemExit(f"a job of {len(self._prompts)} prompts was done before the request beside it")
        if left < self._reserve:
            self._send()

    def _send(self) -> None:
        self._job = self._stack.submit(self._prompts, deduplicate=False)[1]

    def _look(self) -> dict[str, Any]:
        return self._stack.get(f"/jobs/{self._job['id']}")


def _role(process: psutil.Process) -> str:
    """Return "api" or "worker" for `python -m api` or `python -m worker`; "broker" is a binary."""
    words = process.cmdline()
    return words[words.index("-m") + 1] if "-m" in words else "broker"


def _layerstack() -> list[str]:
    is_module = find_spec("layerstack.__main__") is not None
    return [sys.executable, *(["-m", "layerstack"] if is_module else [str(Path(sys.executable).parent / "layerstack")])]


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return cast("int", probe.getsockname()[1])
