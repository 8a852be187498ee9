"""The worker as a real process."""

import signal
import time

import pytest
from ulid import ULID

from jobs import keys
from jobs.messages import PredictMessage, PredictReply, unpack_reply
from jobs.queue import BULK, INTERACTIVE, make_celery, publish_predict
from jobs.records import JobStatus, WorkerPresence
from tests.support import wait_for


@pytest.fixture
def app(settings):
    celery = make_celery(settings)
    yield celery
    celery.close()


def start(spawn, broker, tiny, store_path, **variables):
    options = {"broker_url": broker.url, "storage": store_path, "model": tiny, "device": "cpu"} | variables
    return spawn("worker", **options)


def ask(app, redis):
    request = PredictMessage(request_id=str(ULID()), prompts=["a fox"], deadline=time.time() + 60)
    publish_predict(app, request)
    return unpack_reply(redis.blpop(keys.reply(request.request_id), timeout=60)[1])


def test_it_answers_and_announces_itself_and_signs_off_with_exit_code_0(spawn, broker, tiny, tmp_path, app, encoder):
    worker = start(spawn, broker, tiny, tmp_path)
    with broker.client() as redis:
        assert isinstance(ask(app, redis), PredictReply)
        (worker_id,) = redis.smembers(keys.WORKER_IDS)
        presence = WorkerPresence.model_validate_json(redis.get(keys.worker(worker_id.decode())))
        assert presence.encoder.fingerprint == encoder.fingerprint
        assert redis.exists(keys.encoder(encoder.fingerprint))
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(10) == 0
        assert not redis.exists(keys.WORKER_IDS, keys.worker(worker_id.decode()))


@pytest.mark.parametrize("storage_url", ["s3"], indirect=True)
def test_sigterm_hands_chunks_back_and_the_next_worker_finishes_the_job(
    spawn, broker, tiny, storage_url, store, make_job
):
    record = make_job(count=3_000, chunk_rows=1_500)
    worker = start(spawn, broker, tiny, storage_url, bulk_threads=2)
    with broker.client() as redis:
        wait_for(lambda: redis.hlen(keys.progress(record.id)) == 2, worker, worker.log)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(10) == 0
        assert redis.llen(BULK) == 2
        assert redis.keys("layerstack:lease:*") == []
    assert store.files(record.id).parts == {}
    start(spawn, broker, tiny, storage_url)
    wait_for(lambda: store.files(record.id).status() == JobStatus.SUCCEEDED)
    assert store.files(record.id).failures == {}
    assert store.manifest(record.id).succeeded == 3_000


def test_sigterm_hands_back_the_requests_that_would_take_long(spawn, broker, tiny, tmp_path, app):
    count, prompts = 40, [f"prompt number {n}" for n in range(1_000)]
    worker = start(spawn, broker, tiny, tmp_path, interactive_threads=count)
    with broker.client() as redis:
        for _ in range(count):
            publish_predict(app, PredictMessage(request_id=str(ULID()), prompts=prompts, deadline=time.time() + 600))
        wait_for(lambda: redis.keys("layerstack:reply:*"), worker, worker.log)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(10) == 0
        waiting = redis.llen(INTERACTIVE)
        assert waiting > 0
        assert waiting + len(redis.keys("layerstack:reply:*")) == count
    assert "Traceback" not in worker.log.read_text()


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_a_chunk_that_takes_longer_than_the_visibility_timeout_is_done_once(
    spawn, broker, tiny, storage_url, store, make_job
):
    record = make_job(count=4_000, chunk_rows=4_000)
    worker = start(spawn, broker, tiny, storage_url, bulk_threads=2, visibility_timeout_s=2)
    wait_for(lambda: store.files(record.id).status() == JobStatus.SUCCEEDED, worker, worker.log)
    with broker.client() as redis:
        wait_for(lambda: not redis.exists("unacked", BULK), worker, worker.log)
    assert worker.log.read_text().count("is done") == 1


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_interactive_requests_are_answered_while_long_chunks_fill_the_bulk_slots(
    spawn, broker, tiny, storage_url, app, store, make_job
):
    record = make_job(count=30_000, chunk_rows=10_000)
    worker = start(spawn, broker, tiny, storage_url, bulk_threads=2)
    with broker.client() as redis:
        wait_for(lambda: redis.hlen(keys.progress(record.id)) == 2, worker, worker.log)
        for _ in range(5):
            assert isinstance(ask(app, redis), PredictReply)
    assert store.files(record.id).parts == {}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"model": "/nowhere"}, "/nowhere: no such folder"),
        ({"model": "demo", "storage": "/proc/nope"}, "LAYERSTACK_STORAGE='/proc/nope' cannot be used"),
        ({"attention": "telepathy"}, "attention 'telepathy' is not one of auto, varlen, sdpa"),
        ({"model": ""}, "LAYERSTACK_MODEL is not set"),
        ({"preset": "flux9"}, "no preset 'flux9'"),
        ({"token_budget": "many"}, "LAYERSTACK_TOKEN_BUDGET='many'"),
        ({"storage": "s3://nowhere/jobs"}, "LAYERSTACK_STORAGE='s3://nowhere/jobs' cannot be used"),
    ],
)
@pytest.mark.usefixtures("bucket")
def test_it_does_not_start_with_a_bad_setting_and_says_which(spawn, broker, tiny, tmp_path, variables, message):
    worker = start(spawn, broker, tiny, tmp_path, **variables)
    assert worker.wait(60) == 1
    assert message in worker.log.read_text()
    assert "Traceback" not in worker.log.read_text()


def test_sigterm_while_loading_ends_it_at_once(spawn, broker, tiny, tmp_path):
    worker = start(spawn, broker, tiny, tmp_path)
    time.sleep(1)  # importing torch: no event tells of that
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(10) == 0
