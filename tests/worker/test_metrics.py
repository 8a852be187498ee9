"""What a worker counts and serves."""

import signal
import socket
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ulid import ULID

from encoder import Engine
from jobs import keys
from jobs.errors import SettingsError
from jobs.layout import job_names
from jobs.messages import PredictMessage
from jobs.queue import make_celery, publish_predict
from jobs.records import WorkerPresence
from jobs.settings import Settings
from tests import sample_jobs
from tests.support import free_port, status_of, wait_for
from worker.chunks import ChunkEncoder
from worker.metrics import MetricsServer, Written, count
from worker.presence import Presence
from worker.recall import Recall

S = 60


class Watch:
    """Lets a chunk go on."""

    def check(self):
        pass

    def progress(self, rows):
        pass


def ask(broker, redis):
    """Have a worker answer one request."""
    request = PredictMessage(request_id=str(ULID()), prompts=["a fox"], deadline=time.time() + S)
    app = make_celery(Settings(broker_url=broker.url))
    publish_predict(app, request)
    app.close()
    assert redis.blpop([keys.reply(request.request_id)], timeout=S)


def scraped(port):
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    return {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_a_worker_counts_what_its_engine_and_its_parts_were(encoder, store):
    written = Written()
    record = sample_jobs.make_job(store, count=5, chunk_rows=3)
    reports = [sample_jobs.do_chunk(store, record, chunk) for chunk in (0, 1)]
    with Engine(encoder) as engine:
        engine.submit(["a fox", "a barn"]).result(S)
        for report in reports:
            written.add(report.part)
        wait_for(lambda: engine.stats().prompts == 2)  # counted beside the delivery of the results
        counters, stats = count(engine, written), engine.stats()
    assert (counters.prompts, counters.rows, counters.capacity) == (2, stats.rows, stats.batches * stats.token_budget)
    assert counters.rows / counters.capacity == stats.fill
    assert counters.waiting_prompts == {"interactive": 0, "bulk": 0}
    assert (counters.written_parts, counters.written_rows) == (2, 5)
    assert counters.written_bytes == sum(report.part.bytes for report in reports)


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_each_part_that_a_worker_writes_is_counted_and_none_that_it_finds(engine, store, make_job):
    record, written = make_job(count=5, chunk_rows=3), Written()
    chunks = ChunkEncoder(store, engine, Recall(engine, 0), written=written)
    for chunk in (0, 1, 1):  # the last is there already
        chunks.encode(record.id, chunk, Watch())
    store.storage.delete(job_names(record.id).report(1))  # as if its worker had died before it counted
    chunks.encode(record.id, 1, Watch())
    sizes = [part.bytes for part in store.files(record.id).view().parts]
    assert written.totals() == {"written_parts": 2, "written_rows": 5, "written_bytes": sum(sizes)}


def test_its_announcement_tells_what_it_has_counted_and_goes_on_doing_so(encoder, broker):
    with Engine(encoder) as engine, broker.client() as redis:
        with Presence(redis, encoder, lambda: count(engine, Written())) as presence:
            engine.submit(["a fox"]).result(S)
            key = keys.worker(presence.now().worker_id)

            def announced():
                content = redis.get(key)
                return content and WorkerPresence.model_validate_json(content).counters.prompts

            wait_for(lambda: announced() == 1)
        assert redis.get(key) is None


def test_a_worker_with_a_port_serves_its_own_metrics_and_stops_with_exit_code_0(spawn, broker, tiny, tmp_path):
    port = free_port()
    worker = spawn(
        "worker", broker_url=broker.url, storage=tmp_path / "s", model=tiny, device="cpu", worker_metrics_port=port
    )
    with broker.client() as redis:
        wait_for(lambda: redis.smembers(keys.WORKER_IDS), worker, worker.log)
        assert scraped(port)["layerstack_worker_prompts_total"] == 0
        assert [status_of(f"http://127.0.0.1:{port}{path}") for path in ("/health", "/ready")] == [200, 200]
        ask(broker, redis)
    wait_for(lambda: scraped(port)["layerstack_worker_prompts_total"] == 1)
    found = scraped(port)
    assert found["layerstack_worker_rows_total"] > 0
    assert found["process_resident_memory_bytes"] > 1e6
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 0


def test_a_port_in_use_is_told_before_the_model_is_loaded(spawn, broker, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        worker = spawn(
            "worker", broker_url=broker.url, storage=tmp_path / "s", model="/nowhere", worker_metrics_port=port
        )
        assert worker.wait(60) == 1
    said = worker.log.read_text()
    assert (
        f"LAYERSTACK_WORKER_METRICS_PORT={port}: 127.0.0.1:{port} cannot be listened on (Address already in use)"
        in said
    )
    assert "/nowhere" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize("host", ["nowhere.invalid", "203.0.113.1"])
def test_an_address_that_is_not_this_machines_is_told(host):
    with pytest.raises(SettingsError, match=f"{host}:.* cannot be listened on"):
        MetricsServer(host, free_port())


def test_a_worker_lives_before_it_is_ready():
    port = free_port()
    with MetricsServer("127.0.0.1", port):
        assert [status_of(f"http://127.0.0.1:{port}{path}") for path in ("/health", "/ready")] == [200, 503]


def test_without_a_port_nothing_is_served():
    with MetricsServer("nowhere.invalid", None) as server:
        server.show(lambda: None)
