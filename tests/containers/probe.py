"""Check a running `docker compose` stack as one of its users would; standard library only, so that it runs anywhere.

    docker compose up --wait && python3 tests/containers/probe.py

Environment:
    LAYERSTACK_URL: of the API; default http://127.0.0.1:7860.
    LAYERSTACK_API_KEY: if the API asks for one.
    WORKERS: how many workers there should be; default 1.
    PATIENCE_S: seconds that anything may take; default 120.

With `--http-only` it asks Docker nothing, and so checks any server.
"""

from __future__ import annotations

import array
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

URL = os.environ.get("LAYERSTACK_URL", "http://127.0.0.1:7860")
KEY = os.environ.get("LAYERSTACK_API_KEY")
WORKERS = int(os.environ.get("WORKERS", "1"))
PROMPTS = ["a fox in the snow", "an old lighthouse keeper reads a map by candlelight"]
JOB_PROMPTS, PART_ROWS = 600, 10
PATIENCE_S = float(os.environ.get("PATIENCE_S", "120"))
COMMANDS = {
    "api": "python -m api",
    "worker": "python -m worker",
    "broker": "valkey-server",
    "replies": "valkey-server",
}
UIDS = {"api": "10001", "worker": "10001", "broker": "999", "replies": "999"}


class ProbeError(Exception):
    """Something is not as it should be."""


def check(condition: object, message: str) -> None:
    if not condition:
        raise ProbeError(message)


def call(method: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
    """Return status and body of an answer."""
    headers = {"Authorization": f"Bearer {KEY}"} | headers if KEY else headers
    content = None if body is None else json.dumps(body).encode()
    if content is not None:
        headers["Content-Type"] = "application/json"
    request = urllib.request.Request(URL + path, content, headers, method=method)  # noqa: S310 - http, by the operator
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine needs no proxy
    try:
        with opener.open(request, timeout=PATIENCE_S) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read()


def get(path: str) -> Any:
    status, body = call("GET", path)
    check(status == 200, f"GET {path}: {status} {body[:300]!r}")
    return json.loads(body)


def docker(*words: str) -> str:
    return subprocess.run(["docker", *words], check=True, capture_output=True, text=True).stdout  # noqa: S607 - no shell; the caller's docker


def check_ready() -> str:
    checks = get("/ready")["checks"]
    check(set(checks.values()) == {"ok"}, f"/ready: {checks}")
    return ", ".join(checks)


def check_predict() -> str:
    """Encode the same prompts as JSON and as safetensors, and compare the numbers."""
    status, body = call("POST", "/predict", {"prompt": PROMPTS})
    check(status == 200, f"/predict: {status} {body[:300]!r}")
    answer = json.loads(body)
    status, body = call("POST", "/predict", {"prompt": PROMPTS}, Accept="application/vnd.safetensors")
    check(status == 200, f"/predict as safetensors: {status} {body[:300]!r}")
    (length,) = struct.unpack("<Q", body[:8])
    header, data = json.loads(body[8 : 8 + length]), body[8 + length :]
    for name, code in (("prompt_embeds", "f"), ("text_ids", "q")):
        check(header[name]["shape"] == answer["shapes"][name], f"{name}: the shapes differ")
        begin, end = header[name]["data_offsets"]
        check(header[name]["dtype"] in {"F32", "I64"}, f"{name}: {header[name]['dtype']}; this probe reads F32 only")
        binary = array.array(code, data[begin:end])
        nested = _flat(answer[name])
        check(len(binary) == len(nested) > 0, f"{name}: {len(binary)} and {len(nested)} values")
        differ = max(abs(a - b) for a, b in zip(binary, nested, strict=True))
        check(differ < 1e-5, f"{name}: JSON and safetensors differ by {differ}")
    return f"{answer['shapes']['prompt_embeds']} in two formats"


def _flat(nested: list[Any]) -> list[float]:
    return [value for each in nested for value in _flat(each)] if isinstance(nested[0], list) else nested


def check_job() -> str:
    """Have a job done, and download and check every part of it."""
    before = written_parts() if WORKERS > 1 else {}
    job_id = submit_job(JOB_PROMPTS)
    manifest = finished_job(job_id, JOB_PROMPTS)
    for part in manifest["parts"]:
        _, content = call("GET", f"/jobs/{job_id}/parts/{part['index']}")
        check(content[:4] == content[-4:] == b"PAR1", f"part {part['index']} is no Parquet file")
        check(hashlib.sha256(content).hexdigest() == part["sha256"], f"part {part['index']} is not what was written")
    shares = ""
    if before:
        added = wait_for(lambda: _all_grew(before, written_parts()), "every worker to have written parts")
        shares = f", by worker {sorted(added.values())}"
    check(call("DELETE", f"/jobs/{job_id}")[0] == 204, f"job {job_id} cannot be deleted")
    return f"{manifest['rows']} rows in {len(manifest['parts'])} parts, {manifest['bytes']} bytes{shares}"


def submit_job(num_prompts: int) -> str:
    """Return the id of a new job."""
    prompts = [f"{PROMPTS[index % 2]}, number {index}" for index in range(num_prompts)]
    status, body = call("POST", "/jobs", {"prompts": prompts, "options": {"chunk_rows": PART_ROWS}})
    check(status == 202, f"/jobs: {status} {body[:300]!r}")
    return json.loads(body)["id"]


def finished_job(job_id: str, num_prompts: int) -> dict[str, Any]:
    """Wait until a job has ended, and return its manifest."""

    def ended() -> dict[str, Any] | None:
        job = get(f"/jobs/{job_id}")
        return job if job["status"] in {"succeeded", "failed", "cancelled"} else None

    job = wait_for(ended, f"job {job_id} to end")
    check(job["status"] == "succeeded", f"job {job_id}: {job['status']} {job.get('error')}")
    manifest = get(f"/jobs/{job_id}/results")
    check(manifest["rows"] == manifest["succeeded"] == num_prompts, f"job {job_id}: {manifest['succeeded']} rows")
    return manifest


def _all_grew(before: dict[str, float], now: dict[str, float]) -> dict[str, int] | None:
    added = {worker: int(now.get(worker, 0) - parts) for worker, parts in before.items()}
    return added if all(added.values()) and sum(added.values()) >= JOB_PROMPTS // PART_ROWS else None


def written_parts() -> dict[str, float]:
    """Return how many parts each worker has written since its start."""
    _, body = call("GET", "/metrics")
    found = re.findall(r'^layerstack_worker_written_parts_total\{worker="(\w+)"\} (\S+)$', body.decode(), re.MULTILINE)
    return {worker: float(parts) for worker, parts in found}


def wait_for(condition: Any, what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        check(time.monotonic() < deadline, f"waited {PATIENCE_S:g} s for {what}")
        time.sleep(0.2)
    return found


def check_workers() -> str:
    wait_for(lambda: get("/encoder")["num_workers"] == WORKERS, f"/encoder to know of {WORKERS} workers")
    wait_for(lambda: len(written_parts()) == WORKERS, f"/metrics to know of {WORKERS} workers")
    return f"{WORKERS} loaded"


def check_processes() -> str:
    """Nobody is root, nobody can become it, and nothing can write to an image."""
    ids = docker("compose", "ps", "--quiet").split()
    seen: dict[str, set[str]] = {}
    for container in json.loads(docker("inspect", *ids)):
        service, host = container["Config"]["Labels"]["com.docker.compose.service"], container["HostConfig"]
        check(host["ReadonlyRootfs"], f"{service}: its root file system can be written to")
        check("no-new-privileges:true" in host["SecurityOpt"], f"{service}: may gain privileges")
        check(host["CapDrop"] == ["ALL"] and not host["CapAdd"], f"{service}: keeps capabilities")
        processes = processes_of(container["Id"])
        users = {uid for uid, _ in processes}
        if service in COMMANDS:
            check(users == {UIDS[service]}, f"{service}: runs as {users}")
            check(any(COMMANDS[service] in args for _, args in processes), f"{service}: {processes}")
        seen.setdefault(service, set()).update(users)
    check(seen.keys() >= COMMANDS.keys(), f"services: {sorted(seen)}")
    return ", ".join(f"{service} as {'/'.join(sorted(users))}" for service, users in sorted(seen.items()))


def processes_of(container: str) -> list[tuple[str, str]]:
    """Return user and command line of each process in a container, none of which may be root's."""
    lines = docker("top", container, "-eo", "pid,uid,args").splitlines()[1:]
    processes = [(uid, args) for _, uid, args in (line.split(maxsplit=2) for line in lines)]
    check("0" not in {uid for uid, _ in processes}, f"{container}: runs as root: {processes}")
    return processes


def check_password() -> str:
    for service in ("broker", "replies"):
        said = docker("compose", "exec", "-T", service, "valkey-cli", "ping")
        check("NOAUTH" in said, f"{service}: answers without a password: {said!r}")
    return "broker and replies ask for one"


def run(checks: dict[str, Callable[[], str]]) -> int:
    """Print what each check says; returns the exit code, 1 after the first that fails."""
    for name, each in checks.items():
        try:
            print(f"{name:10} {each()}", flush=True)
        except (ProbeError, OSError, subprocess.CalledProcessError) as exc:
            print(f"{name:10} FAILED: {exc}", flush=True)
            return 1
    return 0


def main() -> int:
    checks = {"ready": check_ready, "workers": check_workers, "predict": check_predict, "job": check_job}
    if "--http-only" not in sys.argv[1:]:
        checks |= {"processes": check_processes, "password": check_password}
    return run(checks)


if __name__ == "__main__":
    sys.exit(main())
