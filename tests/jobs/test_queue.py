import base64
import json
import time

import pytest
from kombu.exceptions import OperationalError
from ulid import ULID

from jobs.messages import ChunkMessage, PredictMessage
from jobs.queue import BULK, INTERACTIVE, make_celery, publish_chunks, publish_predict, waiting_chunks
from jobs.settings import Settings


@pytest.fixture
def app(settings):
    celery = make_celery(settings)
    yield celery
    celery.close()


def test_each_kind_of_message_goes_to_its_queue_alone_as_json(app, redis):
    publish_predict(app, PredictMessage(request_id=str(ULID()), prompts=["a"], deadline=time.time()))
    publish_chunks(app, [ChunkMessage(job_id=str(ULID()), chunk=n) for n in range(3)])
    assert (redis.llen(INTERACTIVE), redis.llen(BULK)) == (1, 3)
    for queue in (INTERACTIVE, BULK):
        message = json.loads(redis.lindex(queue, 0))
        assert message["content-type"] == "application/json"


def test_prompts_are_in_the_body_of_a_message_alone(app, redis):
    publish_predict(app, PredictMessage(request_id=str(ULID()), prompts=["a red barn"], deadline=time.time()))
    message = json.loads(redis.lindex(INTERACTIVE, 0))
    assert b"a red barn" in base64.b64decode(message.pop("body"))
    assert "red barn" not in json.dumps(message)


def test_chunks_that_wait_can_be_told_from_the_queue(app, redis):
    sent = {(str(ULID()), n) for n in range(3)}
    assert waiting_chunks(redis) == set()
    publish_chunks(app, [ChunkMessage(job_id=job_id, chunk=chunk) for job_id, chunk in sent])
    assert waiting_chunks(redis) == sent


def test_a_chunk_that_a_worker_has_just_taken_waits_too_for_as_long_as_the_worker_may_live(app, redis):
    job_id = str(ULID())
    publish_chunks(app, [ChunkMessage(job_id=job_id, chunk=0)])
    with app.connection_for_read() as connection, connection.SimpleQueue(app.amqp.queues[BULK]) as queue:
        taken = queue.get(timeout=10)
        assert redis.llen(BULK) == 0
        assert waiting_chunks(redis) == set()
        assert waiting_chunks(redis, delivered_within_s=60) == {(job_id, 0)}
        taken.ack()
    assert waiting_chunks(redis, delivered_within_s=60) == set()


def test_messages_reach_the_queue_after_redis_was_emptied(app, redis):
    message = ChunkMessage(job_id=str(ULID()), chunk=0)
    publish_chunks(app, [message])
    redis.flushall()
    publish_chunks(app, [message])
    assert waiting_chunks(redis) == {(message.job_id, 0)}


def test_a_broker_that_is_down_is_told_at_once(tmp_path):
    app = make_celery(Settings(broker_url=f"unix://{tmp_path}/nobody"))
    started = time.monotonic()
    with pytest.raises(OperationalError):
        publish_chunks(app, [ChunkMessage(job_id=str(ULID()), chunk=0)])
    assert time.monotonic() - started < 10


def test_no_pickle_is_accepted(settings):
    conf = make_celery(settings).conf
    assert conf.accept_content == ["json"]
    assert conf.task_serializer == "json"
    assert conf.result_backend is None
