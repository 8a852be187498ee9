import threading
import time

import pytest
from celery.exceptions import Reject
from ulid import ULID

from jobs import keys
from jobs.messages import PredictFailure, PredictReply, unpack_reply
from jobs.records import JobStatus
from worker.tasks import Tasks


@pytest.fixture
def redis(broker):
    with broker.client() as client:
        yield client


@pytest.fixture
def stopping():
    return threading.Event()


@pytest.fixture
def tasks(engine, store, redis, stopping):
    return Tasks(engine=engine, store=store, redis=redis, reply_redis=redis, chunk_attempts=2, stopping=stopping)


def predict(tasks, redis, prompts, deadline_in=60.0):
    request_id = str(ULID())
    message = {"request_id": request_id, "prompts": prompts, "deadline": time.time() + deadline_in}
    tasks.predict(message)
    content = redis.lpop(keys.reply(request_id))
    return None if content is None else unpack_reply(content)


def test_a_request_gets_its_rows(tasks, redis, encoder):
    reply = predict(tasks, redis, ["a fox", "a hen"])
    assert isinstance(reply, PredictReply)
    assert reply.fingerprint == encoder.fingerprint
    assert [len(rows) for rows in reply.own_rows] == [n - 32 for n in reply.num_tokens]


def test_a_reply_that_nobody_fetches_expires(tasks, redis):
    request_id = str(ULID())
    tasks.predict({"request_id": request_id, "prompts": ["a"], "deadline": time.time() + 9})
    assert 0 < redis.ttl(keys.reply(request_id)) <= keys.REPLY_TTL_S


def test_a_bad_prompt_is_told(tasks, redis):
    reply = predict(tasks, redis, ["a", "\ud800"])
    assert isinstance(reply, PredictFailure)
    assert reply.position == 1


def test_a_request_past_its_deadline_never_reaches_the_encoder(tasks, redis, monkeypatch):
    monkeypatch.setattr("worker.tasks.answer", lambda *_: pytest.fail("encoded"))
    assert predict(tasks, redis, ["a"], deadline_in=-1) is None


def test_whatever_goes_wrong_the_client_is_told(tasks, redis, monkeypatch):
    def broken(*_):
        raise RuntimeError("secret of the inside")

    monkeypatch.setattr("worker.tasks.answer", broken)
    reply = predict(tasks, redis, ["a"])
    assert isinstance(reply, PredictFailure)
    assert "secret" not in reply.reason


def test_a_chunk_is_encoded_and_its_progress_told(tasks, redis, store, make_job):
    record = make_job(count=4)
    tasks.chunk({"job_id": record.id, "chunk": 0})
    assert store.view(record.id).status == JobStatus.SUCCEEDED
    assert redis.hgetall(keys.progress(record.id)) == {b"0": b"4"}


def test_a_chunk_does_not_fail_for_want_of_redis(tasks, broker, store, make_job):
    record = make_job(count=4)
    broker.process.terminate()
    broker.process.wait()
    tasks.chunk({"job_id": record.id, "chunk": 0})
    assert store.view(record.id).status == JobStatus.SUCCEEDED


def test_a_stopping_worker_gives_the_message_back(tasks, stopping, make_job):
    stopping.set()
    with pytest.raises(Reject) as rejected:
        tasks.chunk({"job_id": make_job().id, "chunk": 0})
    assert rejected.value.requeue


def test_a_chunk_that_fails_goes_back_until_its_attempts_are_used_up(tasks, stopping, store, make_job, monkeypatch):
    monkeypatch.setattr(stopping, "wait", lambda _: None)
    record = make_job(fingerprint="0123456789abcdef")  # of another encoder, so it fails each time
    with pytest.raises(Reject) as rejected:
        tasks.chunk({"job_id": record.id, "chunk": 1})
    assert rejected.value.requeue
    assert store.view(record.id).status == JobStatus.QUEUED
    tasks.chunk({"job_id": record.id, "chunk": 1})
    view = store.view(record.id)
    assert view.status == JobStatus.FAILED
    assert "chunk 1, after 2 attempts: FingerprintMismatchError" in view.error


@pytest.mark.parametrize(
    "message", [{"job_id": "01M8259KQ6ZM43ZW7F9E4YQJWV", "chunk": 0}, {"job_id": "../x", "chunk": 0}, {}]
)
def test_a_message_for_a_job_that_is_gone_or_cannot_be_read_is_dropped(tasks, message):
    tasks.chunk(message)  # neither raises nor goes back
