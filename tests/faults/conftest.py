"""One stack for all short tests of faults: starting it takes most of their time."""

import os
import random

import pytest

from tests.faults.checks import check_tidy, finished_rows
from tests.faults.cluster import Cluster
from tests.faults.workload import known_prompts, submit


@pytest.fixture(scope="session")
def rng():
    seed = int(os.environ.get("FAULTS_SEED", random.randrange(10**6)))
    print(f"FAULTS_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(scope="session")
def stack_for_faults(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("cluster")
    with Cluster(folder, tiny, chunk_attempts=2, chunk_crashes=3) as running:
        yield running
        running.mend()
        check_tidy(running)


@pytest.fixture
def cluster(stack_for_faults):
    stack_for_faults.mend()
    return stack_for_faults


@pytest.fixture(scope="session")
def known(stack_for_faults, rng):
    """Prompts, and what an undisturbed job made of them."""
    prompts = [{"id": str(n), "prompt": prompt} for n, prompt in enumerate(known_prompts(rng, 100))]
    return finished_rows(stack_for_faults, submit(stack_for_faults, rng, prompts))
