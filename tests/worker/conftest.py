import pytest

from jobs.records import JobOptions, Prompt
from jobs.store import JobStore
from worker.rows import describe


@pytest.fixture
def store(tmp_path):
    return JobStore(tmp_path / "storage")


@pytest.fixture
def make_job(store, encoder):
    """Store a job for the encoder of the tests, and return its record."""

    def make(count=10, chunk_rows=4, **fields):
        info = describe(encoder).model_copy(update=fields)
        return store.create(
            (Prompt(id=str(n), prompt=f"prompt number {n}") for n in range(count)),
            options=JobOptions(),
            encoder=info,
            default_chunk_rows=chunk_rows,
            metadata={},
        )

    return make
