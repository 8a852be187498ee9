"""More requests than the queue holds, clients that leave, and parts of the stack that stop, on a stack of their own."""

import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.support import free_port, kind, local_stack, wait_for

S = 120
LONG = "a very long prompt " * 200  # 512 tokens: a forward of its own
QUEUE = 8


class Overloaded:
    """A stack that is asked for much."""

    def __init__(self, stack, metrics_port):
        self.url = stack.url
        self._metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
        self._process = stack.process

    def predict(self, prompt, timeout=S):
        # JSON of own rows: the answer is small, so that the test is about the queue.
        return httpx.post(f"{self.url}/predict?padding=none", json={"prompt": prompt}, timeout=timeout)

    def counter(self, name):
        """What the worker itself tells of one of its counters."""
        lines = httpx.get(self._metrics_url, timeout=S).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))

    def child(self, room):
        found = psutil.Process(self._process.pid).children(recursive=True)
        return next(each for each in found if room in " ".join(each.cmdline()))


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """A stack with a short queue and the demo encoder, whose forward of 512 rows takes a while."""
    port = free_port()
    folder = tmp_path_factory.mktemp("overload")
    with local_stack(folder, predict_queue_max=QUEUE, worker_metrics_port=port) as found:
        yield Overloaded(found, port)


def test_with_the_queue_full_others_are_429_and_all_that_were_accepted_are_answered(stack):
    with ThreadPoolExecutor(3 * QUEUE) as pool:
        answers = list(pool.map(stack.predict, [LONG] * 3 * QUEUE))
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    assert statuses[200] >= QUEUE
    for answer in answers:
        if answer.status_code == 429:
            assert kind(answer) == (429, "queue-full")
            assert answer.json()["limit"] == QUEUE
            assert int(answer.headers["retry-after"]) >= 1
    assert stack.predict("a fox").status_code == 200


def test_clients_that_leave_while_queued_cost_no_device_time(stack):
    encoded = "layerstack_worker_prompts_total"
    before = stack.counter(encoded)
    busy = [threading.Thread(target=stack.predict, args=([LONG] * 16,)) for _ in range(2)]
    for thread in busy:
        thread.start()
    wait_for(lambda: stack.counter("layerstack_worker_waiting_prompts") >= 16)
    for _ in range(3):
        with pytest.raises(httpx.ReadTimeout):
            stack.predict(LONG, timeout=0.2)
    for thread in busy:
        thread.join(S)
    assert stack.predict("and one more").status_code == 200
    assert stack.counter(encoded) - before == 33
    assert 'layerstack_predict_requests_total{outcome="disconnected"} 3.0' in httpx.get(f"{stack.url}/metrics").text


def test_without_a_worker_it_is_503_until_there_is_one_again(stack):
    stack.child("worker").send_signal(signal.SIGTERM)
    wait_for(lambda: stack.predict("a fox").status_code == 503)
    wait_for(lambda: stack.predict("a fox").status_code == 200)


def test_without_the_broker_it_is_503_and_it_recovers_without_a_restart(stack):
    api = stack.child("api")
    stack.child("broker").kill()
    wait_for(lambda: stack.predict("a fox").status_code == 503)
    wait_for(lambda: stack.predict("a fox").status_code == 200)
    assert stack.child("api") == api
