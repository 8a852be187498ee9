"""A job on a running stack, where a fault strikes, and how long it takes until all is well again."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from jobs.records import JobStatus
from tests.faults.checks import view_of
from tests.faults.cluster import Cluster
from tests.faults.processes import Child
from tests.faults.workload import Job


@dataclass
class Scene:
    """Where a fault strikes.

    Attributes:
        cluster: what it strikes.
        job: what runs meanwhile.
        rng: draws moments, victims and durations.
        patient: whether faults that last do so for long.
        more_jobs: jobs that were created on the way, and have to succeed as well.
        hit: chunks that were under way when the fault struck.
        counted: chunks that were done when recovery began.
        struck_at: when that was.
    """

    cluster: Cluster
    job: Job
    rng: random.Random
    patient: bool = False
    more_jobs: list[Job] = field(default_factory=list)
    hit: set[int] = field(default_factory=set)
    counted: set[int] = field(default_factory=set)
    struck_at: float = 0.0

    def look(self) -> None:
        """Find out what a fault hits that strikes now: the chunks in the queue or with a worker."""
        counted = self.cluster.counted(self.job.id)
        assert len(counted) < self.job.num_chunks, "the job was done before the fault could strike"
        self.hit = self.cluster.outstanding(self.job.id) - counted

    def measure(self) -> None:
        """Measure recovery from here: the fault has struck or, if it lasts, is over. The last call counts."""
        self.counted = self.cluster.counted(self.job.id)
        self.struck_at = time.monotonic()

    def at_a_random_moment(self) -> None:
        """Let up to half a second pass, so that faults do not always strike at the same step."""
        time.sleep(self.rng.uniform(0, 0.5))

    def while_it_lasts(self, short_s: float, long_s: float) -> None:
        """Let a fault last."""
        time.sleep(self.rng.uniform(short_s, long_s) if self.patient else short_s)

    def until_running(self) -> None:
        """Wait until chunks are being worked on and some count."""
        cluster, job_id = self.cluster, self.job.id
        cluster.until(
            lambda: cluster.counted(job_id) and cluster.outstanding(job_id),
            f"job {job_id} is running",
        )

    def a_worker(self) -> Child:
        """Choose a worker that has loaded its encoder."""
        return self.rng.choice(self.cluster.ready_workers())

    def paused_because(self, reason: str) -> None:
        """Wait until the job says that it waits for its storage, and check that this costs no attempts."""

        def is_paused() -> bool:
            view = view_of(self.cluster, self.job)
            return view["status"] == JobStatus.PAUSED and reason in view["error"]

        self.cluster.until(is_paused, f"job {self.job.id} is paused because of {reason!r}")
        failures = self.cluster.store.files(self.job.id).failures.values()
        assert not [failure for failure in failures if failure.attempts], self.cluster.tails()


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        strike: inflicts it, takes back what does not go by itself, and has the scene measure from then on.
        workers: that have loaded their encoder when it strikes.
        late: whether it strikes when most of the job is done.
        mended: what must hold for it to be made good, beside the chunks that it hit.
    """

    strike: Callable[[Scene], None]
    workers: int = 1
    late: bool = False
    mended: Callable[[Scene], bool] = lambda _scene: True

    @property
    def name(self) -> str:
        return self.strike.__name__


@dataclass(frozen=True)
class Recovery:
    """How a fault was survived, in seconds from when it struck, or was over if it lasted.

    Attributes:
        fault: its name.
        goes_on_s: until the next part counts.
        made_good_s: until all chunks count that were in the queue or with a worker, and all else works again.
    """

    fault: str
    goes_on_s: float
    made_good_s: float


def inflict(fault: Fault, scene: Scene) -> Recovery:
    """Let a fault strike a running job, and wait until it is made good."""
    cluster, job_id = scene.cluster, scene.job.id
    scene.until_running()
    scene.at_a_random_moment()
    scene.look()
    fault.strike(scene)

    def goes_on() -> bool:
        counted = cluster.counted(job_id)
        return counted > scene.counted or len(counted) == scene.job.num_chunks

    cluster.until(goes_on, f"job {job_id} goes on after {fault.name}")
    goes_on_at = time.monotonic()
    cluster.until(
        lambda: scene.hit <= cluster.counted(job_id) and fault.mended(scene),
        f"all is well again after {fault.name} (chunks {sorted(scene.hit)} count)",
    )
    return Recovery(fault.name, goes_on_at - scene.struck_at, time.monotonic() - scene.struck_at)


def api_answers(scene: Scene) -> bool:
    try:
        return scene.cluster.http.get(f"/jobs/{scene.job.id}").status_code == 200
    except httpx.TransportError:
        return False
