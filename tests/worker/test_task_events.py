"""Celery's events of a worker process, as Flower hears them."""

import signal
import socket
import subprocess
import threading
import time

import pytest
from ulid import ULID

from jobs import keys
from jobs.messages import PredictMessage, PredictReply, unpack_reply
from jobs.queue import BULK, INTERACTIVE, PREDICT_TASK, make_celery, publish_predict
from tests.support import wait_for

S = 60
HEARTBEATS_S = 4.5  # time for two
INTERACTIVE_WORKER, BULK_WORKER = (f"{queue}@{socket.gethostname()}" for queue in (INTERACTIVE, BULK))


@pytest.fixture
def app(settings):
    celery = make_celery(settings)
    yield celery
    celery.close()


@pytest.fixture
def restart(broker):
    """Kill the broker, and start it again; what needs it is torn down before it ends."""
    started = []

    def start_again():
        broker.process.kill()
        broker.process.wait()
        time.sleep(HEARTBEATS_S)  # the worker fails to tell of these
        started.append(subprocess.Popen(broker.process.args))

    yield start_again
    for process in started:
        process.terminate()
        process.wait()


@pytest.fixture
def heard(app, redis, restart):  # noqa: ARG001 - whatever broker there is outlives this
    """All events from now on, by Celery's own receiver."""
    events = []
    with app.connection() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": events.append})
        thread = threading.Thread(target=receiver.run, kwargs={"wakeup": False})
        thread.start()
        wait_for(lambda: redis.pubsub_numpat() == 1)
        yield events
        receiver.should_stop = True
        thread.join()


def start(spawn, broker, tiny, folder, **variables):
    return spawn("worker", broker_url=broker.url, storage=folder, model=tiny, device="cpu", **variables)


def ask(app, redis):
    request = PredictMessage(request_id=str(ULID()), prompts=["a fox"], deadline=time.time() + S)
    publish_predict(app, request)
    assert isinstance(unpack_reply(redis.blpop(keys.reply(request.request_id), timeout=S)[1]), PredictReply)


def of(events, kind, worker):
    return [event for event in events if (event["type"], event["hostname"]) == (kind, worker)]


def test_with_events_on_what_becomes_of_a_task_is_told_without_its_prompts(
    spawn, broker, tiny, tmp_path, app, redis, heard
):
    worker = start(spawn, broker, tiny, tmp_path, task_events=True)
    ask(app, redis)
    wait_for(lambda: of(heard, "task-succeeded", INTERACTIVE_WORKER), worker, worker.log)
    (received,) = of(heard, "task-received", INTERACTIVE_WORKER)
    (succeeded,) = of(heard, "task-succeeded", INTERACTIVE_WORKER)
    assert (received["name"], received["uuid"]) == (PREDICT_TASK, succeeded["uuid"])
    assert "fox" not in str(heard)
    wait_for(lambda: all(of(heard, "worker-heartbeat", name) for name in (INTERACTIVE_WORKER, BULK_WORKER)))
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 0
    wait_for(lambda: all(of(heard, "worker-offline", name) for name in (INTERACTIVE_WORKER, BULK_WORKER)))


def test_with_events_off_nothing_is_told(spawn, broker, tiny, tmp_path, app, redis, heard):
    start(spawn, broker, tiny, tmp_path)
    ask(app, redis)
    time.sleep(HEARTBEATS_S)
    assert heard == []


def test_with_events_on_a_worker_outlives_its_broker_and_goes_on_telling(
    spawn, broker, tiny, tmp_path, app, redis, restart, heard
):
    worker = start(spawn, broker, tiny, tmp_path, task_events=True)
    ask(app, redis)
    before = len(heard)
    restart()
    wait_for(lambda: of(heard[before:], "worker-heartbeat", INTERACTIVE_WORKER), worker, worker.log)
    ask(app, redis)
    wait_for(lambda: of(heard[before:], "task-succeeded", INTERACTIVE_WORKER), worker, worker.log)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 0
