"""A whole stack of real processes on one storage: a broker, the API and some workers."""

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

import httpx
from redis import Redis, RedisError

from jobs import keys
from jobs.queue import waiting_chunks
from jobs.storage import open_storage
from jobs.store import JobStore
from layerstack.broker import broker_command
from tests.faults.processes import Child
from tests.support import clean_environment, free_port

# Small, so that recovery shows within seconds. Free space is not looked at: other programs use the same disk.
SETTINGS = {
    "device": "cpu",
    "token_budget": 512,
    "lease_s": 2,
    "reconcile_s": 0.5,
    "abandoned_after_s": 3,
    "visibility_timeout_s": 5,
    "storage_reserve_bytes": 0,
}
WORKER_SYNC_S = "0.05"
PATIENCE_S = 180.0


class Cluster:
    """The processes; a context manager that leaves none behind.

    Args:
        folder: for logs, for files that tell processes to fail, and for the storage if that is a folder.
        model: of the workers.
        workers: how many.
        storage: URL of another storage.
        environment: of the processes, beside their settings.
        settings: in place of those above.
    """

    def __init__(self, folder: Path, model: Path, *, workers=2, storage=None, environment=None, **settings) -> None:
        # The path of a unix socket must be short.
        self._private = Path(tempfile.mkdtemp(prefix="ls-faults-"))
        self.folder = folder
        broker_folder = folder / "broker"
        broker_folder.mkdir(parents=True)
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.broker_url = f"unix://{self._private / 's'}"
        self.storage_url = storage or str(folder / "storage")
        chosen = SETTINGS | settings
        chosen |= {"broker_url": self.broker_url, "storage": self.storage_url, "model": model, "port": port}
        variables = {f"LAYERSTACK_{name.upper()}": str(value) for name, value in chosen.items()}
        variables |= {
            "FAULTS_FOLDER": str(folder),
            "PYTHONPATH": str(Path(__file__).parent / "hooks"),
            "OMP_NUM_THREADS": "1",  # several workers share the machine
        }
        everywhere = clean_environment() | variables | (environment or {})

        def child(name: str, command: list[str], **own: str) -> Child:
            return Child(name, command, everywhere | own, folder / f"{name}.log")

        self.broker = child("broker", broker_command(broker_folder, self._private / "s"))
        self.api = child("api", [sys.executable, "-m", "api"])
        command = [sys.executable, "-m", "worker"]
        self.workers = [child(f"worker-{n}", command, FAULTS_SYNC_S=WORKER_SYNC_S) for n in range(workers)]
        self.redis = Redis.from_url(self.broker_url, socket_timeout=60)
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def __enter__(self) -> Self:
        try:
            for child in self.children:
                child.start()
            self.store = JobStore(open_storage(self.storage_url))
            self.until(lambda: len(self.ready_workers()) == len(self.workers), "all workers are ready")
            self.until(lambda: self.answers("/ready"), "the API is ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        for child in self.children:
            if child.alive:
                child.kill()
        self.http.close()
        self.redis.close()
        shutil.rmtree(self._private)

    @property
    def children(self) -> list[Child]:
        return [self.broker, self.api, *self.workers]

    def ready_workers(self) -> list[Child]:
        return [worker for worker in self.workers if worker.alive and worker.said("worker.service: ready")]

    def answers(self, path: str) -> bool:
        """Whether the API answers a GET with 200."""
        try:
            return self.http.get(path).status_code == 200
        except httpx.TransportError:
            return False

    def broker_answers(self) -> bool:
        try:
            return bool(self.redis.ping())
        except RedisError:
            return False

    def mend(self) -> None:
        """Take back what a test that failed may have left, so that the next one begins with a stack that works."""
        for flag in ("failing", "deadly", "bucket"):
            (self.folder / flag).unlink(missing_ok=True)
        for child in self.children:
            if child.alive:
                child.thaw()
                child.limit_files(None)
            else:
                child.start()
        self.until(lambda: self.answers("/ready"), "the stack is ready")

    def submit(self, prompts: list[dict], options: dict) -> str:
        """Create a job as a patient client does: while the service is not available, it asks again."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer = self.http.post("/jobs", json={"prompts": prompts, "options": options})
            except httpx.ConnectError as exc:  # nothing has been sent yet
                refused = str(exc)
            else:
                if answer.status_code == 202:
                    return answer.json()["id"]
                refused = answer.text
                assert answer.status_code == 503, refused
            assert time.monotonic() < deadline, f"no job is accepted: {refused}\n{self.tails()}"
            time.sleep(0.2)

    def outstanding(self, job_id: str) -> set[int]:
        """The chunks of a job that are in the queue or with a worker."""
        begun = {int(chunk) for chunk in self.redis.hkeys(keys.progress(job_id))}
        return begun | {chunk for job, chunk in waiting_chunks(self.redis) if job == job_id}

    def counted(self, job_id: str) -> set[int]:
        """The chunks of a job whose parts count."""
        return set(self.store.files(job_id).parts)

    def until(self, condition, what: str, *, workers_may_die: bool = False) -> None:
        """Wait until `condition` holds; otherwise, or if a process ends by itself, fail with the ends of all logs."""
        unkillable = [self.broker, self.api] if workers_may_die else self.children
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            for child in unkillable:
                assert child.alive or child.ended_on_purpose, f"{child.name} has ended by itself\n{self.tails()}"
            assert time.monotonic() < deadline, f"waited {PATIENCE_S:.0f} s in vain until {what}\n{self.tails()}"
            time.sleep(0.05)

    def tails(self) -> str:
        return "\n".join(child.tail() for child in self.children)
