"""Kill, restart and stop a `docker compose` stack under load, and check that nothing is lost; standard library only.

    docker compose up --wait && python3 tests/containers/outages.py

Takes the environment of `probe.py`, and works in the folder of the compose file. It leaves the stack running.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from probe import PROMPTS, call, check, check_workers, docker, get, run, wait_for

JOB = {
    "prompts": [f"{PROMPTS[index % 2]}, number {index}" for index in range(6000)],
    "options": {"chunk_rows": 10},
}
GRACE_S = 60  # the longest `stop_grace_period`


def submit() -> str:
    status, body = call("POST", "/jobs", JOB)
    check(status == 202, f"/jobs: {status} {body[:300]!r}")
    return json.loads(body)["id"]


def wait_until_half_way(job_id: str) -> int:
    def parts() -> int:
        job = get(f"/jobs/{job_id}")
        check(job["status"] in {"queued", "running"}, f"the job ended {job['status']} before anything was done to it")
        return job["num_parts_done"]

    return wait_for(lambda: number if (number := parts()) >= 20 else None, "20 parts")


def wait_until_done(job_id: str) -> dict:
    def ended() -> dict | None:
        job = get(f"/jobs/{job_id}")
        return job if job["status"] in {"succeeded", "failed", "cancelled"} else None

    job = wait_for(ended, f"job {job_id} to end")
    check(job["status"] == "succeeded", f"job {job_id}: {job['status']} {job.get('error')}")
    manifest = get(f"/jobs/{job_id}/results")
    check(manifest["rows"] == manifest["succeeded"] == len(JOB["prompts"]), f"rows: {manifest['succeeded']}")
    return manifest


def up() -> None:
    docker("compose", "up", "--detach", "--no-build", "--wait")


def check_killed_worker() -> str:
    """A worker is killed under a job; `up` brings another, which goes on."""
    job_id = submit()
    done = wait_until_half_way(job_id)
    docker("compose", "kill", "--signal", "SIGKILL", "worker")
    began = time.monotonic()
    up()
    manifest = wait_until_done(job_id)
    return f"killed after {done} of {len(manifest['parts'])} parts; done {time.monotonic() - began:.0f} s later"


def check_down_and_up() -> str:
    """Containers are removed under a job; volumes keep it, and the jobs that are done."""
    finished = get("/jobs")["jobs"][0]["id"]
    manifest = get(f"/jobs/{finished}/results")
    job_id = submit()
    done = wait_until_half_way(job_id)
    docker("compose", "down")
    up()
    check(get(f"/jobs/{finished}/results") == manifest, "the manifest of the job that was done is another one")
    wait_until_done(job_id)
    return f"down after {done} parts; both jobs are there and done"


def check_stop_under_load() -> str:
    """`stop` ends everything in order while a job runs and clients ask."""
    job_id = submit()
    wait_until_half_way(job_id)
    statuses: list[int] = []
    stopped = threading.Event()

    def ask() -> None:
        while not stopped.is_set():
            try:
                statuses.append(call("POST", "/predict", {"prompt": PROMPTS})[0])
            except OSError:  # the API is gone
                statuses.append(0)
                stopped.wait(0.1)

    with ThreadPoolExecutor(8) as clients:
        for _ in range(8):
            clients.submit(ask)
        try:
            wait_for(lambda: statuses.count(200) >= 20, "20 answers")
            began = time.monotonic()
            docker("compose", "stop")
            took = time.monotonic() - began
        finally:
            stopped.set()
    ids = docker("compose", "ps", "--all", "--quiet").split()
    codes = {each["Name"]: each["State"]["ExitCode"] for each in json.loads(docker("inspect", *ids))}
    check(set(codes.values()) == {0}, f"exit codes: {codes}")
    check(took < GRACE_S, f"it took {took:.0f} s to stop")
    up()
    wait_until_done(job_id)
    seen = {status: statuses.count(status) for status in sorted(set(statuses))}
    return f"stopped in {took:.1f} s, {len(codes)} containers with exit code 0; statuses of /predict meanwhile: {seen}"


if __name__ == "__main__":
    sys.exit(run([check_workers, check_killed_worker, check_down_and_up, check_stop_under_load]))
