import json
import time

import pytest
from kombu.exceptions import OperationalError
from ulid import ULID

from jobs.messages import ChunkMessage, PredictMessage
from jobs.queue import BULK, INTERACTIVE, make_celery, publish_chunks, publish_predict
from jobs.settings import Settings


def test_each_kind_of_message_goes_to_its_queue_alone_as_json(settings, broker):
    app = make_celery(settings)
    publish_predict(app, PredictMessage(request_id=str(ULID()), prompts=["a"], deadline=time.time()))
    publish_chunks(app, [ChunkMessage(job_id=str(ULID()), chunk=n) for n in range(3)])
    app.close()
    with broker.client() as redis:
        assert (redis.llen(INTERACTIVE), redis.llen(BULK)) == (1, 3)
        for queue in (INTERACTIVE, BULK):
            message = json.loads(redis.lindex(queue, 0))
            assert message["content-type"] == "application/json"


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
