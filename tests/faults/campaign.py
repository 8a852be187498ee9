"""Many faults, one after the other, on one stack."""

import random
import time
from dataclasses import dataclass, field

from tests.faults.checks import check_results
from tests.faults.cluster import Cluster
from tests.faults.scene import Fault, Recovery, Scene, inflict
from tests.faults.workload import Row, entries, submit

JOB_ROWS = 2000
# Chunks that have to be left when a fault strikes, so that it strikes a job at work.
LEFT, LEFT_FOR_LATE = 80, 40
STORM_ROWS, STORM_KILLS, STORM_EVERY_S = 5000, 20, 3.0


@dataclass
class Campaign:
    """Lets faults strike one job after the other, and checks each job.

    Attributes:
        known: prompts, and the rows that are right for them.
        jobs, rows: how many have been checked.
    """

    cluster: Cluster
    rng: random.Random
    known: dict[str, Row]
    recoveries: list[Recovery] = field(default_factory=list)
    jobs: int = 0
    rows: int = 0

    def run(self, faults: list[Fault]) -> None:
        """Let `faults` strike, those that are late in their job last."""
        early = [fault for fault in faults if not fault.late]
        late = [fault for fault in faults if fault.late]
        while early or late:
            scene = self._scene(JOB_ROWS)
            while early and self._ready_for(early[-1]) and self._left(scene) > LEFT:
                self._strike(early.pop(), scene)
            self.cluster.until(lambda scene=scene: self._left(scene) <= LEFT, "most of the job is done")
            if late and self._left(scene) > LEFT_FOR_LATE:
                self._strike(late.pop(), scene)
            self._check(scene)

    def storm(self) -> None:
        """Every three seconds of a minute, empty the broker and kill a worker, be it ready or just starting."""
        scene = self._scene(STORM_ROWS)
        for _ in range(STORM_KILLS):
            self.cluster.redis.flushall()
            worker = self.rng.choice(self.cluster.workers)
            worker.kill()
            worker.start()
            time.sleep(STORM_EVERY_S)
        left = self._left(scene)
        print(f"{time.strftime('%H:%M:%S')} storm: {STORM_KILLS} kills, {left} of {scene.job.num_chunks} chunks left")
        self._check(scene)

    def _scene(self, rows: int) -> Scene:
        prompts = entries(self.rng, list(self.known), rows)
        return Scene(self.cluster, submit(self.cluster, self.rng, prompts), self.rng, patient=True)

    def _left(self, scene: Scene) -> int:
        return scene.job.num_chunks - len(self.cluster.counted(scene.job.id))

    def _ready_for(self, fault: Fault) -> bool:
        self.cluster.until(
            lambda: len(self.cluster.ready_workers()) >= fault.workers, f"{fault.workers} workers are ready"
        )
        return True

    def _strike(self, fault: Fault, scene: Scene) -> None:
        recovery = inflict(fault, scene)
        self.recoveries.append(recovery)
        told = f"goes on after {recovery.goes_on_s:.1f} s, made good after {recovery.made_good_s:.1f} s"
        print(f"{time.strftime('%H:%M:%S')} {len(self.recoveries):3} {fault.name}: {told}", flush=True)

    def _check(self, scene: Scene) -> None:
        for job in [scene.job, *scene.more_jobs]:
            check_results(self.cluster, job, self.known)
            self.jobs += 1
            self.rows += len(job.prompts)
