import threading
import time
from dataclasses import replace

import pytest
from celery.exceptions import Reject
from ulid import ULID

from encoder import Engine
from jobs import keys
from jobs.layout import job_names
from jobs.messages import PredictFailure, PredictReply, unpack_reply
from jobs.storage import open_storage
from jobs.store import JobStore
from tests.sample_jobs import make_job as make_foreign_job
from tests.support import wait_for
from tests.worker.running import Running, S, at_rest, begin, events, run
from worker.chunks import ChunkEncoder
from worker.leases import Leases
from worker.recall import Recall

# Requests.


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


def test_a_request_past_its_deadline_never_reaches_the_encoder(tasks, redis, forwards):
    assert predict(tasks, redis, ["a"], deadline_in=-1) is None
    assert forwards.texts == []


def test_a_request_that_has_not_reached_the_device_of_a_worker_that_stops_goes_back(tasks, redis, encoder):
    with Engine(encoder) as closed:
        pass
    with pytest.raises(Reject) as caught:
        predict(replace(tasks, engine=closed), redis, ["a fox"])
    assert caught.value.requeue
    assert redis.keys("layerstack:reply:*") == []


def test_a_request_that_was_withdrawn_before_it_began_never_reaches_the_encoder(tasks, redis, forwards):
    message = {"request_id": str(ULID()), "prompts": ["a"], "deadline": time.time() + 60}
    redis.set(keys.withdrawn(message["request_id"]), 1)
    tasks.predict(message)
    assert forwards.texts == []
    assert not redis.exists(keys.reply(message["request_id"]))


def test_a_request_that_is_withdrawn_while_it_waits_for_the_device_never_reaches_it(tasks, redis, forwards, engine):
    before = engine.stats()
    with forwards.held(engine):
        message = {"request_id": str(ULID()), "prompts": ["a fox"], "deadline": time.time() + 60}
        thread = threading.Thread(target=tasks.predict, args=(message,))
        thread.start()
        wait_for(lambda: sum(engine.stats().waiting_prompts.values()) == 1)
        wait_for(lambda: redis.publish(keys.WITHDRAWN, message["request_id"]))
        thread.join(S)
        assert not thread.is_alive()
    engine.submit(["one more"]).result()
    assert forwards.texts == [["hold"], ["one more"]]
    assert engine.stats().dropped_prompts - before.dropped_prompts == 1
    assert not redis.exists(keys.reply(message["request_id"]))


def test_whatever_goes_wrong_the_client_is_told(tasks, redis, monkeypatch):
    def broken(*_):
        raise RuntimeError("secret of the inside")

    monkeypatch.setattr("worker.tasks.answer", broken)
    reply = predict(tasks, redis, ["a"])
    assert isinstance(reply, PredictFailure)
    assert "secret" not in reply.reason


def test_a_request_that_cannot_be_read_is_dropped(tasks, redis):
    tasks.predict({"prompts": ["a"]})
    assert redis.keys("layerstack:reply:*") == []


# Chunks.


def test_a_chunk_that_is_done_is_told(tasks, redis, store, make_job):
    record = make_job()
    run(tasks, record, 1)
    assert store.has_part(record.id, 1)
    assert events(redis) == [(1, "done")]
    assert at_rest(redis, record, 1)


def test_the_progress_of_a_chunk_is_told_while_its_lease_is_held(tasks, redis, engine, forwards, make_job):
    record = make_job()
    with forwards.held(engine):
        running = begin(tasks, redis, record)
        assert redis.exists(keys.lease(record.id, 0))
        assert redis.hgetall(keys.progress(record.id)) == {b"0": b"0"}
    running.join()
    assert at_rest(redis, record)


def test_a_chunk_that_another_worker_has_is_left_to_it(tasks, redis, broker, forwards, make_job):
    record = make_job()
    with broker.client() as other, Leases(other, 60.0) as leases:
        leases.acquire(keys.lease(record.id, 0))
        run(tasks, record)
    assert (forwards.texts, events(redis)) == ([], [])


def test_a_chunk_that_another_worker_took_over_is_left_to_it_in_the_middle(
    tasks, redis, store, engine, forwards, make_job
):
    record = make_job()
    with forwards.held(engine):
        running = begin(tasks, redis, record)
        redis.set(keys.lease(record.id, 0), "somebody else")
        running.join()
    assert running.error is None
    assert redis.get(keys.lease(record.id, 0)) == b"somebody else"
    assert redis.hexists(keys.progress(record.id), "0")  # it is the other's now
    assert events(redis) == []
    assert store.storage.files(job_names(record.id).parts_folder) == []


def test_a_chunk_goes_on_after_redis_was_emptied(tasks, redis, store, engine, forwards, make_job):
    record = make_job()
    with forwards.held(engine):
        running = begin(tasks, redis, record)
        redis.flushall()
    running.join()
    assert store.has_part(record.id, 0)
    assert events(redis) == [(0, "done")]


def test_a_lease_that_was_lost_with_redis_is_taken_again_at_the_next_progress(tasks, redis, make_job, monkeypatch):
    record, held = make_job(), []

    def encode(_chunks, _job_id, _chunk, watch):
        redis.flushall()
        watch.progress(1)
        held.append(redis.exists(keys.lease(record.id, 0)))

    monkeypatch.setattr(ChunkEncoder, "encode", encode)
    monkeypatch.setattr("worker.tasks._PROGRESS_EVERY_S", -1.0)
    with Leases(redis, 600.0) as leases:  # renews by itself only after minutes
        run(replace(tasks, leases=leases), record)
    assert held == [1]


def test_without_a_broker_the_message_goes_back(tasks, broker, make_job):
    record = make_job()
    broker.process.terminate()
    broker.process.wait()
    with pytest.raises(Reject) as rejected:
        run(tasks, record)
    assert rejected.value.requeue


def test_a_chunk_that_is_under_way_is_finished_without_a_broker(
    tasks, broker, redis, store, engine, forwards, make_job
):
    record = make_job()
    with forwards.held(engine):
        running = begin(tasks, redis, record)
        broker.process.terminate()
        broker.process.wait()
    running.join()
    assert running.error is None
    assert store.has_part(record.id, 0)


def test_a_chunk_that_fails_is_told_with_its_attempts_counted(tasks, redis, store, make_job):
    record = make_job()
    prompts = store.storage.read(job_names(record.id).prompts(1))
    store.storage.write(job_names(record.id).prompts(1), b"rubbish")
    for attempts, gave_up in ((1, False), (2, True)):
        run(tasks, record, 1)
        failure = store.failure(record.id, 1)
        assert (failure.attempts, failure.crashes, failure.gave_up) == (attempts, 0, gave_up)
        assert failure.error.startswith(f"RecordFormatError: {job_names(record.id).prompts(1)} is damaged")
    assert events(redis) == [(1, "failed"), (1, "failed")]
    assert at_rest(redis, record, 1)
    store.storage.write(job_names(record.id).prompts(1), prompts)
    run(tasks, record, 1)  # delivered once more
    assert not store.has_part(record.id, 1)
    store.retry(record.id)
    run(tasks, record, 1)
    assert store.has_part(record.id, 1)


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_a_chunk_for_which_the_storage_has_no_room_waits_and_is_not_to_blame(tasks, redis, store, make_job):
    full = replace(tasks, chunks=replace(tasks.chunks, reserve_bytes=2**62))
    record = make_job()
    run(full, record)
    assert events(redis) == [(0, "stalled")]
    assert b"are to stay free" in redis.get(keys.trouble(record.id))
    assert store.failure(record.id, 0) is None
    assert at_rest(redis, record)


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_a_chunk_whose_storage_does_not_answer_waits_and_is_not_to_blame(tasks, redis, bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    silent = JobStore(open_storage(f"{bucket}/silent"))
    job_id = str(ULID())
    replace(tasks, chunks=replace(tasks.chunks, store=silent)).chunk({"job_id": job_id, "chunk": 3})
    assert events(redis) == [(3, "stalled")]
    assert b"s3://bucket/silent/jobs/" in redis.get(keys.trouble(job_id))


def test_a_failure_record_that_cannot_be_read_holds_no_chunk_up(tasks, redis, store, make_job):
    record = make_job()
    store.storage.write(job_names(record.id).failure(0), b"rubbish")
    run(tasks, record)
    assert store.has_part(record.id, 0)
    assert at_rest(redis, record)


def test_a_chunk_that_the_device_fails_of_is_a_crash_and_does_not_go_back_to_the_queue(
    tasks, redis, store, encoder, forwards, make_job
):
    record = make_job()
    forwards.fault = lambda _texts: RuntimeError("illegal address")
    with Engine(encoder) as engine:
        run(replace(tasks, chunks=ChunkEncoder(store, engine, Recall(engine, 0))), record)
    failure = store.failure(record.id, 0)
    assert (failure.attempts, failure.crashes, failure.gave_up) == (0, 1, False)
    assert "illegal address" in failure.error
    assert events(redis) == [(0, "failed")]
    assert at_rest(redis, record)


def test_a_fault_while_the_worker_stops_is_not_the_chunks(tasks, store, stopping, make_job, monkeypatch):
    def stop_and_fail(*_):
        stopping.set()
        raise RuntimeError("the engine is gone")

    monkeypatch.setattr(ChunkEncoder, "encode", stop_and_fail)
    record = make_job()
    with pytest.raises(Reject):
        run(tasks, record)
    assert store.failure(record.id, 0) is None


def test_a_chunk_for_another_encoder_goes_back_to_the_queue(tasks, redis, store):
    record = make_foreign_job(store)
    with pytest.raises(Reject) as rejected:
        run(tasks, record)
    assert rejected.value.requeue
    assert at_rest(redis, record)
    assert store.failure(record.id, 0) is None


@pytest.mark.parametrize(
    "message", [{"job_id": "01M8259KQ6ZM43ZW7F9E4YQJWV", "chunk": 0}, {"job_id": "../x", "chunk": 0}, {}]
)
def test_a_message_for_a_job_that_is_gone_or_cannot_be_read_is_dropped(tasks, message):
    tasks.chunk(message)  # neither raises nor goes back


def test_a_chunk_that_a_worker_died_of_runs_alone(tasks, redis, store, engine, forwards, make_job):
    record = make_job()
    store.note_failure(record.id, 1, "its worker died", crashed=True, limit=5)
    with forwards.held(engine):
        first = begin(tasks, redis, record, 0)
        suspect = Running(tasks, record, 1)
        wait_for(lambda: redis.exists(keys.lease(record.id, 1)))
        assert not redis.hexists(keys.progress(record.id), "1")
    first.join()
    suspect.join()
    assert store.has_part(record.id, 0)
    assert store.has_part(record.id, 1)
