"""`GET /metrics`, as Prometheus gets it."""

import re
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from ulid import ULID

from api.app import create_app
from api.metrics import Metrics
from jobs import keys
from jobs.messages import ChunkMessage, PredictMessage
from jobs.queue import make_celery, publish_chunks, publish_predict
from jobs.records import WorkerPresence
from jobs.settings import Settings
from tests.sample_jobs import COUNTERS, INFO

pytestmark = pytest.mark.parametrize("storage_url", ["folder"], indirect=True)


def scraped(client):
    """All samples, as Prometheus reads them: (name, labels) -> value."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(client, name, **labels):
    return scraped(client)[name, tuple(sorted(labels.items()))]


def test_requests_are_counted_by_the_template_of_their_route(api):
    api.get("/jobs/01ARZ3NDEKTSV4RRFFQ69G5FAV")
    api.get("/jobs/01BX5ZZKBKACTAV9WEVGEMMVRZ")
    found = scraped(api)
    labels = (("method", "GET"), ("route", "/jobs/{job_id}"), ("status", "404"))
    assert found["layerstack_http_requests_total", labels] == 2
    assert not any("01ARZ" in str(key) for key in found)


def test_a_request_that_a_middleware_refuses_is_counted_too(storage_url, storage, broker):  # noqa: ARG001 - has to be there
    settings = Settings(broker_url=broker.url, storage=storage_url, body_max_bytes=10)
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        assert client.post("/jobs", json={"prompts": ["a" * 100]}).status_code == 413
        found = scraped(client)
    assert sum(number for (name, labels), number in found.items()
               if name == "layerstack_http_requests_total" and ("status", "413") in labels) == 1  # fmt: skip


def test_jobs_by_status_are_those_that_the_reconciler_has_published(api, redis):
    assert "layerstack_jobs" not in {name for name, _ in scraped(api)}
    redis.hset(keys.JOB_COUNTS, mapping={"running": 2, "succeeded": 40})
    assert value(api, "layerstack_jobs", status="running") == 2
    assert value(api, "layerstack_jobs", status="succeeded") == 40


def test_each_worker_tells_what_it_has_counted(api, redis):
    presence = WorkerPresence(
        worker_id=str(ULID()), host="gpu-1", started_at=datetime.now(UTC), encoder=INFO, counters=COUNTERS
    )
    redis.set(keys.worker(presence.worker_id), presence.model_dump_json(), ex=300)
    redis.sadd(keys.WORKER_IDS, presence.worker_id)
    worker = presence.worker_id[-8:]
    assert value(api, "layerstack_worker_prompts_total", worker=worker) == COUNTERS.prompts
    assert value(api, "layerstack_worker_written_bytes_total", worker=worker) == COUNTERS.written_bytes
    assert value(api, "layerstack_worker_waiting_prompts", worker=worker, priority="bulk") == 7
    info = [dict(labels) for name, labels in scraped(api) if name == "layerstack_worker_info"]
    assert [found["fingerprint"] for found in info if found["host"] == "gpu-1"] == [INFO.fingerprint]


def test_requests_that_wait_are_those_whose_deadline_has_not_passed(api, redis):
    now = datetime.now(UTC).timestamp()
    redis.zadd(keys.PREDICT_WAITING, {"a": now + 60, "b": now + 60, "old": now - 60})
    assert value(api, "layerstack_predict_waiting") == 2


def test_messages_that_no_worker_has_taken_are_counted_by_queue(api, broker):
    queues = ("interactive", "bulk")
    assert [value(api, "layerstack_queue_messages", queue=queue) for queue in queues] == [0, 0]
    job_id, app = str(ULID()), make_celery(Settings(broker_url=broker.url))
    publish_chunks(app, [ChunkMessage(job_id=job_id, chunk=chunk) for chunk in range(3)])
    publish_predict(app, PredictMessage(request_id=str(ULID()), prompts=["a fox"], deadline=time.time() + 60))
    app.close()
    assert [value(api, "layerstack_queue_messages", queue=queue) for queue in queues] == [1, 3]


def test_without_any_worker_the_rest_is_told(storage_url, storage, broker):  # noqa: ARG001 - has to be there
    with TestClient(
        create_app(Settings(broker_url=broker.url, storage=storage_url)), base_url="http://127.0.0.1"
    ) as client:
        assert value(client, "layerstack_broker_up") == 1
        assert value(client, "layerstack_predict_waiting") == 0


def test_without_the_broker_what_the_server_knows_itself_is_told(api, broker):
    broker.process.kill()
    broker.process.wait()
    found = scraped(api)
    assert found["layerstack_broker_up", ()] == 0
    assert found["layerstack_http_requests_in_progress", ()] == 1
    assert not any(name.startswith("layerstack_worker") for name, _ in found)


def test_the_process_and_its_version_are_told(api):
    assert value(api, "process_resident_memory_bytes") > 1e6
    (labels,) = (dict(labels) for name, labels in scraped(api) if name == "layerstack_build_info")
    assert labels["version"] == api.get("/health").json()["version"]


def test_openmetrics_is_told_to_whom_asks_for_it(api):
    api.get("/health")
    answer = api.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert "layerstack_http_requests" in {family.name for family in parse_openmetrics(answer.text)}


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=one", "text/plain;version=;escaping=x", ";"])
def test_an_accept_header_that_makes_no_sense_gets_the_plain_text(api, accept):
    answer = api.get("/metrics", headers={"Accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")


def test_the_docs_list_every_metric(api):
    page = (Path(__file__).parents[2] / "docs" / "observability.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`(layerstack_\w+)`", page))
    families = text_string_to_metric_families(api.get("/metrics").text)
    told = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    told = {name for name in told if name.startswith("layerstack_") and not name.endswith("_created")}
    assert told == listed


def test_two_apps_in_one_process_count_apart(api, storage_url, broker):
    api.get("/health")
    settings = Settings(broker_url=broker.url, storage=storage_url)
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as other:
        labels = (("method", "GET"), ("route", "/health"), ("status", "200"))
        assert ("layerstack_http_requests_total", labels) not in scraped(other)


def test_what_came_of_a_predict_is_counted(storage_url):  # noqa: ARG001 - every test of this file has one
    metrics = Metrics()
    metrics.predicted(0.02, 0.3, num_prompts=2, num_tokens=70)
    metrics.refused("queue-full")
    metrics.accepted(1000)
    get = metrics.registry.get_sample_value
    assert get("layerstack_predict_requests_total", {"outcome": "answered"}) == 1
    assert get("layerstack_predict_requests_total", {"outcome": "queue-full"}) == 1
    assert get("layerstack_predict_prompts_total") == 2
    assert get("layerstack_predict_tokens_total") == 70
    assert get("layerstack_predict_queue_seconds_sum") == pytest.approx(0.02)
    assert get("layerstack_predict_encode_seconds_bucket", {"le": "0.5"}) == 1
    assert get("layerstack_jobs_accepted_total") == 1
    assert get("layerstack_jobs_accepted_prompts_total") == 1000
