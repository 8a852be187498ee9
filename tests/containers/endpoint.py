"""Run the worker image alone, as an inference endpoint does, and compare its answers with this machine's.

    .venv/bin/python -m encoder.tiny /tmp/tiny
    .venv/bin/python tests/containers/endpoint.py /tmp/tiny

The folder with the model is mounted read-only at /repository. `examples/driver.py` does the comparison.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import probe

IMAGE = os.environ.get("LAYERSTACK_WORKER_IMAGE", "layerstack-worker")
PORT = 7870
DRIVER = Path(__file__).parents[2] / "examples" / "driver.py"


def start(folder: Path, name: str, *options: str) -> None:
    hardened = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
    where = ("--publish", f"127.0.0.1:{PORT}:7860", "--volume", f"{folder}:/repository:ro")
    keys = ("--env", "LAYERSTACK_ALLOW_WITHOUT_KEYS=true")
    probe.docker("run", "--detach", "--name", name, *hardened, *where, *keys, *options, IMAGE, "layerstack", "up")


def check_ready() -> str:
    """Return what /ready said, in order, until it said 200."""
    seen: list[int] = []

    def ask() -> bool:
        try:
            status = probe.call("GET", "/ready")[0]
        except OSError:  # nobody listens yet
            return False
        if status not in seen:
            seen.append(status)
        return status == 200

    began = time.monotonic()
    probe.wait_for(ask, "/ready")
    probe.check(seen == [503, 200], f"/ready said {seen}")
    return f"503, then 200 after {time.monotonic() - began:.1f} s"


def check_predict(folder: Path) -> str:
    ended = subprocess.run([sys.executable, DRIVER, probe.URL, folder], check=False, capture_output=True, text=True)
    probe.check(ended.returncode == 0, ended.stdout + ended.stderr)
    return "; ".join(ended.stdout.splitlines())


def check_processes(name: str) -> str:
    processes = probe.processes_of(name)
    return f"{len(processes)}, as {'/'.join(sorted({uid for uid, _ in processes}))}"


def check_stop(name: str) -> str:
    began = time.monotonic()
    probe.docker("stop", "--time", "30", name)
    took = time.monotonic() - began
    code = probe.docker("inspect", "--format", "{{.State.ExitCode}}", name).strip()
    probe.check(code == "0", f"exit code {code}: {probe.docker('logs', name)}")
    return f"in {took:.1f} s, exit code 0"


def main() -> int:
    folder, name = Path(sys.argv[1]).resolve(), f"layerstack-endpoint-{uuid.uuid4().hex[:8]}"
    probe.URL = f"http://127.0.0.1:{PORT}"
    try:
        start(folder, name, *sys.argv[2:])
        return probe.run(
            {
                "ready": check_ready,
                "processes": lambda: check_processes(name),
                "predict": lambda: check_predict(folder),
                "job": probe.check_job,
                "stop": lambda: check_stop(name),
            }
        )
    finally:
        subprocess.run(["docker", "rm", "--force", "--volumes", name], check=False, capture_output=True)  # noqa: S607 - the caller's docker


if __name__ == "__main__":
    sys.exit(main())
