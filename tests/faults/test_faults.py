"""Each kind of fault strikes a running job, and no row is lost, doubled or wrong. `make faults` injects many more."""

import pytest

from tests.faults.checks import check_results
from tests.faults.faults import FAULTS, FOLDER_FAULTS
from tests.faults.scene import Scene, inflict
from tests.faults.workload import entries, submit

JOB_ROWS = 300


@pytest.mark.parametrize("fault", FAULTS + FOLDER_FAULTS, ids=lambda fault: fault.name)
def test_a_job_ends_with_every_row_once_and_right_despite(fault, cluster, rng, known):
    cluster.until(lambda: len(cluster.ready_workers()) >= fault.workers, f"{fault.workers} workers are ready")
    scene = Scene(cluster, submit(cluster, rng, entries(rng, list(known), JOB_ROWS)), rng)
    print(inflict(fault, scene))
    for job in [scene.job, *scene.more_jobs]:
        check_results(cluster, job, known)
