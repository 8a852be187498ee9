import threading
from datetime import timedelta

import pytest
from ulid import ULID

from jobs.messages import JobEvent
from jobs.queue import make_celery
from jobs.records import Prompt
from jobs.settings import Settings
from jobs.store import JobStore
from tests import sample_jobs
from tests.sample_jobs import INFO
from worker.chunks import ChunkEncoder
from worker.housekeeping import Housekeeper
from worker.leases import Leases
from worker.notes import JobNotes
from worker.recall import Recall
from worker.reconciler import Reconciler
from worker.rows import describe
from worker.tasks import Tasks
from worker.turns import Turns
from worker.withdrawals import Withdrawals


@pytest.fixture
def make_job(store, encoder):
    """Store a job for the encoder of the tests, and return its record."""

    def make(count=10, chunk_rows=4, texts=None, **options):
        texts = [f"prompt number {n}" for n in range(count)] if texts is None else texts
        prompts = (Prompt(id=str(n), prompt=text) for n, text in enumerate(texts))
        return sample_jobs.make_job(store, prompts=prompts, chunk_rows=chunk_rows, encoder=describe(encoder), **options)

    return make


@pytest.fixture
def reconcile(store, broker):
    """Start a reconciler -> what stops it; all of them are stopped at the end."""
    stops = []

    def start(*, search_every_s=0.1, fingerprint=INFO.fingerprint, retention=None, abandoned_after=timedelta(hours=1)):
        stopping, redis, app = threading.Event(), broker.client(), make_celery(Settings(broker_url=broker.url))
        own_store = JobStore(store.storage)
        reconciler = Reconciler(
            store=own_store,
            redis=redis,
            app=app,
            notes=JobNotes(redis),
            housekeeper=Housekeeper(own_store, retention=retention, abandoned_after=abandoned_after),
            fingerprint=fingerprint,
            slots=1,
            search_every_s=search_every_s,
            lease_s=0.2,
            chunk_crashes=2,
            read_all=True,
            stopping=stopping,
        )
        thread = threading.Thread(target=reconciler.run)
        thread.start()

        def stop():
            stopping.set()
            JobNotes(redis).tell(JobEvent(job_id=str(ULID())))  # so that it need not wait for one
            thread.join(60)
            assert not thread.is_alive()
            redis.close()
            app.close()

        stops.append(stop)
        return stop

    yield start
    for stop in stops:
        stop()


@pytest.fixture
def notes(redis):
    return JobNotes(redis)


@pytest.fixture
def stopping():
    return threading.Event()


@pytest.fixture
def tasks(engine, store, redis, stopping):
    with Leases(redis, 4.0) as leases, Withdrawals(redis) as withdrawals:
        yield Tasks(
            engine=engine,
            chunks=ChunkEncoder(store, engine, Recall(engine, 1000)),
            leases=leases,
            notes=JobNotes(redis),
            reply_redis=redis,
            chunk_attempts=2,
            chunk_crashes=3,
            withdrawals=withdrawals,
            stopping=stopping,
            turns=Turns(),
        )
