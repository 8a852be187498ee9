"""Traces, as a collector gets them from real processes."""

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support import clean_environment, free_port, status_of, wait_for


class Collector:
    """An HTTP server that takes spans."""

    def __init__(self):
        self._lock = threading.Lock()
        self._requests = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with collector._lock:
                    collector._requests.append((self.path, body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args):
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def spans(self):
        """All spans so far, each with the name of its service."""
        with self._lock:
            requests = list(self._requests)
        assert {path for path, _ in requests} <= {"/v1/traces"}
        found = []
        for _, body in requests:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = attributes(resource.resource)["service.name"]
                found += [(service, span) for scope in resource.scope_spans for span in scope.spans]
        return found

    def named(self, name):
        """The one span of a name, and its service."""
        (found,) = (entry for entry in self.spans() if entry[1].name == name)
        return found


def attributes(holder):
    return {entry.key: getattr(entry.value, entry.value.WhichOneof("value")) for entry in holder.attributes}


@pytest.fixture
def collector(monkeypatch):
    found = Collector()
    thread = threading.Thread(target=found.server.serve_forever)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    yield found
    found.server.shutdown()
    found.server.server_close()
    thread.join()


@pytest.fixture
def running(spawn, broker, tiny, tmp_path):
    """An API and a worker, with the API's address."""
    port = free_port()
    options = {"broker_url": broker.url, "storage": tmp_path / "storage", "log_format": "json", "log_level": "DEBUG"}
    api = spawn("api", port=port, **options)
    worker = spawn("worker", model=tiny, device="cpu", **options)
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: status_of(f"{url}/ready") == 200, worker, worker.log)
    return url, api, worker


def stop(*processes):
    for process in processes:
        process.terminate()
    assert [process.wait(20) for process in processes] == [0] * len(processes)


def test_a_request_is_one_trace_from_http_through_the_queue_to_the_engine(collector, running):
    url, api, worker = running
    asked = {"prompt": ["a fox", "a barn"]}
    answer = httpx.post(f"{url}/predict?format=safetensors", json=asked, headers={"X-Request-ID": "mine-1"}, timeout=60)
    assert answer.status_code == 200
    httpx.get(f"{url}/metrics")
    stop(api, worker)  # what is not sent by then is sent at the end
    http_service, http = collector.named("POST /predict")
    send_service, send = collector.named("send layerstack.predict")
    run_service, run = collector.named("run layerstack.predict")
    encode_service, encode = collector.named("encode")
    assert (http_service, send_service) == ("layerstack-api", "layerstack-api")
    assert (run_service, encode_service) == ("layerstack-worker", "layerstack-worker")
    assert {span.trace_id for span in (http, send, run, encode)} == {http.trace_id}
    assert not http.parent_span_id
    assert send.parent_span_id == http.span_id
    assert run.parent_span_id == send.span_id
    assert encode.parent_span_id == run.span_id
    assert attributes(http)["http.route"] == "/predict"
    assert attributes(run)["layerstack.request_id"] == "mine-1"
    told = attributes(encode)
    assert (told["layerstack.prompts"], told["layerstack.batches_waited"]) == (2, 0)
    assert told["layerstack.tokens"] == sum(map(int, answer.headers["Layerstack-Num-Tokens"].split(",")))
    assert not any(span.name.endswith(("/health", "/ready", "/metrics")) for _, span in collector.spans())


def test_a_trace_that_the_caller_began_goes_on(collector, running):
    url, api, worker = running
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    httpx.get(f"{url}/jobs", headers={"traceparent": f"00-{trace_id}-{parent}-01"}).raise_for_status()
    stop(api, worker)
    _, http = collector.named("GET /jobs")
    assert (http.trace_id.hex(), http.parent_span_id.hex()) == (trace_id, parent)


def test_a_chunk_is_a_span_that_tells_its_job(collector, running):
    url, api, worker = running
    job = httpx.post(f"{url}/jobs", json={"prompts": ["a fox"]}, timeout=60).json()
    wait_for(lambda: httpx.get(f"{url}/jobs/{job['id']}").json()["status"] == "succeeded", worker, worker.log)
    stop(api, worker)
    service, run = collector.named("run layerstack.encode_chunk")
    assert service == "layerstack-worker"
    told = attributes(run)
    assert (told["layerstack.job_id"], told["layerstack.chunk"]) == (job["id"], 0)


def test_log_lines_of_a_request_tell_its_trace_and_its_id(collector, running):
    url, api, worker = running
    answer = httpx.post(f"{url}/predict?format=pt", json={"prompt": "a fox"}, timeout=60)
    stop(api, worker)
    _, http = collector.named("POST /predict")
    (line,) = (line for line in api.log.read_text().splitlines() if '"api.access"' in line)
    assert http.trace_id.hex() in line
    assert answer.headers["X-Request-ID"] in line


def test_the_service_has_the_name_that_is_set(collector, spawn, tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    port = free_port()
    api = spawn("api", port=port, storage=tmp_path / "storage", broker_url=f"unix://{tmp_path}/nobody")
    wait_for(lambda: status_of(f"http://127.0.0.1:{port}/jobs") == 200, api, api.log)
    stop(api)
    assert {service for service, _ in collector.spans()} == {"mine"}


def test_a_collector_that_is_away_holds_up_nothing(spawn, tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"http://127.0.0.1:{free_port()}/v1/traces")
    port = free_port()
    api = spawn("api", port=port, storage=tmp_path / "storage", broker_url=f"unix://{tmp_path}/nobody")
    wait_for(lambda: status_of(f"http://127.0.0.1:{port}/jobs") == 200, api, api.log)
    api.terminate()
    assert api.wait(10) == 0


def ran(code, **variables):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean_environment() | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_the_packages_an_endpoint_is_an_error_that_names_the_extra():
    code = "import sys\nsys.modules['opentelemetry.sdk.trace'] = None\nfrom jobs.process import begin\nbegin('api')"
    done = ran(code, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:4318")
    assert done.returncode == 1
    assert "OTEL_EXPORTER_OTLP_ENDPOINT is set, and traces need the extra `tracing`" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_without_an_endpoint_nothing_of_the_extra_is_imported(tmp_path, variables):
    code = (
        "import sys\nfrom jobs.process import begin\nfrom api.app import create_app\n"
        "create_app(begin('api'))\n"
        "sys.exit(any(name.startswith(('opentelemetry.sdk.trace', 'opentelemetry.exporter')) for name in sys.modules))"
    )
    done = ran(code, LAYERSTACK_STORAGE=str(tmp_path), **variables)
    assert done.returncode == 0, done.stderr
