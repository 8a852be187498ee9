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

from probe import PROMPTS, call, check, check_workers, docker, finished_job, get, run, submit_job, wait_for

JOB_PROMPTS = 6000
GRACE_S = 60  # the longest `stop_grace_period`


def wait_until_half_way(job_id: str) -> int:
    def parts() -> int:
        job = get(f"/jobs/{job_id}")
        check(job["status"] in {"queued", "running"}, f"the job ended {job['status']} before anything was done to it")
        return job["num_parts_done"]

    return wait_for(lambda: number if (number := parts()) >= 20 else None, "20 parts")


def up() -> None:
    docker("compose", "up", "--detach", "--no-build", "--wait")


def check_killed_worker() -> str:
    """A worker is killed under a job; `up` brings another, which goes on."""
    job_id = submit_job(JOB_PROMPTS)
    done = wait_until_half_way(job_id)
    docker("compose", "kill", "--signal", "SIGKILL", "worker")
    began = time.monotonic()
    up()
    manifest = finished_job(job_id, JOB_PROMPTS)
    return f"killed after {done} of {len(manifest['parts'])} parts; done {time.monotonic() - began:.0f} s later"


def check_down_and_up() -> str:
    """Containers are removed under a job; volumes keep it, and the jobs that are done."""
    finished = get("/jobs")["jobs"][0]["id"]
    manifest = get(f"/jobs/{finished}/results")
    job_id = submit_job(JOB_PROMPTS)
    done = wait_until_half_way(job_id)
    docker("compose", "down")
    up()
    check(get(f"/jobs/{finished}/results") == manifest, "the manifest of the job that was done is another one")
    finished_job(job_id, JOB_PROMPTS)
    return f"down after {done} parts; both jobs are there and done"


def check_stop_under_load() -> str:
    """`stop` ends everything in order while a job runs and clients ask."""
    job_id = submit_job(JOB_PROMPTS)
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
    finished_job(job_id, JOB_PROMPTS)
    seen = {status: statuses.count(status) for status in sorted(set(statuses))}
    return f"stopped in {took:.1f} s, {len(codes)} containers with exit code 0; statuses of /predict meanwhile: {seen}"


if __name__ == "__main__":
    checks = {
        "workers": check_workers,
        "kill": check_killed_worker,
        "down": check_down_and_up,
        "stop": check_stop_under_load,
    }
    sys.exit(run(checks))
