import pytest

from jobs.records import Prompt
from tests import sample_jobs
from worker.rows import describe


@pytest.fixture
def make_job(store, encoder):
    """Store a job for the encoder of the tests, and return its record."""

    def make(count=10, chunk_rows=4, texts=None, **options):
        texts = [f"prompt number {n}" for n in range(count)] if texts is None else texts
        prompts = (Prompt(id=str(n), prompt=text) for n, text in enumerate(texts))
        return sample_jobs.make_job(store, prompts=prompts, chunk_rows=chunk_rows, encoder=describe(encoder), **options)

    return make
