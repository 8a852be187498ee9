import signal
import threading
import time

import httpx
import numpy as np
import pytest

from jobs import keys
from jobs.messages import PredictReply, pack_reply
from jobs.queue import INTERACTIVE
from jobs.tensors import save_tensors
from tests.sample_jobs import INFO, announce
from tests.support import kind, wait_for

S = 60
REPLY = PredictReply(
    fingerprint=INFO.fingerprint,
    max_length=INFO.max_length,
    encode_ms=1.5,
    own_rows=[np.ones((3, INFO.embed_dim), np.float32)],
    num_tokens=np.array([5], np.int32),
    truncated=np.array([False]),
)


class Calling:
    """A POST /predict in a thread of its own."""

    def __init__(self, url, timeout=S):
        self.answer = self.error = None
        self._thread = threading.Thread(target=self._run, args=(url, timeout))
        self._thread.start()

    def _run(self, url, timeout):
        try:
            self.answer = httpx.post(f"{url}/predict?format=safetensors", json={"prompt": "a"}, timeout=timeout)
        except httpx.TransportError as exc:
            self.error = exc

    def join(self):
        self._thread.join(S)
        assert not self._thread.is_alive()
        return self.answer


def waiting(redis):
    return [request_id.decode() for request_id in redis.zrange(keys.PREDICT_WAITING, 0, -1)]


def answer(redis, request_id):
    constants = {"prefix_rows": np.zeros((2, 4), np.float32), "pad_row": np.zeros(4, np.float32)}
    redis.set(keys.encoder(INFO.fingerprint), save_tensors(constants))
    redis.rpush(keys.reply(request_id), pack_reply(REPLY))


@pytest.fixture
def queued(lone_api, broker, redis):
    """A server, some encoder that seems to be loaded, and a request that waits for it."""

    def start(timeout=S, **settings):
        announce(redis)
        url = lone_api(broker.url, **settings)
        calling = Calling(url, timeout)
        wait_for(lambda: redis.llen(INTERACTIVE) == 1)
        return url, calling, waiting(redis)[0]

    return start


def test_a_request_gets_the_reply_of_a_worker(queued, redis):
    _, calling, request_id = queued()
    answer(redis, request_id)
    response = calling.join()
    assert response.status_code == 200
    assert response.headers["layerstack-num-tokens"] == "5"
    assert float(response.headers["layerstack-encode-ms"]) == 1.5
    assert waiting(redis) == []
    assert redis.llen(keys.PREDICT_ANSWERED) == 1


def test_a_client_that_leaves_frees_its_place_and_tells_the_workers(queued, redis):
    with redis.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(keys.WITHDRAWN)
        _, calling, request_id = queued(timeout=1.0, predict_timeout_s=500)
        calling.join()
        assert isinstance(calling.error, httpx.ReadTimeout)
        wait_for(lambda: waiting(redis) == [])
        assert 500 < redis.ttl(keys.withdrawn(request_id)) <= 501  # until its deadline nobody encodes it
        told = []
        wait_for(lambda: (message := channel.get_message()) and told.append(message["data"].decode()) is None)
        assert told == [request_id]


def test_a_request_that_nobody_answers_in_time_is_504_and_withdrawn(queued, redis):
    _, calling, request_id = queued(predict_timeout_s=1)
    response = calling.join()
    assert kind(response) == (504, "no-answer")
    assert response.json()["limit"] == 1
    assert redis.exists(keys.withdrawn(request_id))


def test_a_request_whose_last_worker_goes_is_503_at_once_and_withdrawn(queued, redis):
    _, calling, request_id = queued()
    gone = time.monotonic()
    redis.delete(keys.WORKER_IDS)
    response = calling.join()
    assert kind(response) == (503, "no-worker")
    assert time.monotonic() - gone < 10
    assert redis.exists(keys.withdrawn(request_id))


def test_a_full_queue_is_429_and_who_waits_is_answered_all_the_same(queued, redis):
    url, calling, request_id = queued(predict_queue_max=1)
    response = httpx.post(f"{url}/predict", json={"prompt": "b"})
    assert kind(response) == (429, "queue-full")
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["limit"] == 1
    assert redis.llen(INTERACTIVE) == 1
    answer(redis, request_id)
    assert calling.join().status_code == 200


def test_as_many_requests_wait_side_by_side_as_the_queue_takes(queued, redis):
    url, first, _ = queued(predict_queue_max=130)  # more than a pool of redis-py has connections, unless told
    others = [Calling(url) for _ in range(129)]
    wait_for(lambda: len(waiting(redis)) == 130)
    for request_id in waiting(redis):
        answer(redis, request_id)
    assert {calling.join().status_code for calling in (first, *others)} == {200}


def test_a_broker_that_hangs_is_503_soon_for_who_waits_and_for_who_comes(queued, broker):
    url, calling, _ = queued()
    hung = time.monotonic()
    broker.process.send_signal(signal.SIGSTOP)
    try:
        waited = calling.join()
        came = time.monotonic()
        response = httpx.post(f"{url}/predict", json={"prompt": "b"}, timeout=S)
        answered = time.monotonic()
    finally:
        broker.process.send_signal(signal.SIGCONT)
    assert kind(waited) == kind(response) == (503, "broker-unavailable")
    assert came - hung < 9
    assert answered - came < 9  # a handshake that hangs is not tried twice
    assert 'layerstack_predict_requests_total{outcome="failed"} 2.0' in httpx.get(f"{url}/metrics").text
