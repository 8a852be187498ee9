import signal

import httpx
import pytest

from tests.support import free_port, status_of, wait_for


def test_a_ready_stack_says_so(http):
    assert http.get("/health").json()["status"] == "ok"
    assert http.get("/ready").json()["checks"] == {"broker": "ok", "storage": "ok", "encoder": "ok"}


def test_the_encoder_is_described(http, tiny, encoder):
    info = http.get("/encoder").json()
    assert (info["model"], info["fingerprint"]) == (str(tiny), encoder.fingerprint)
    assert (info["layers"], info["num_workers"], info["random_weights"]) == ([10, 20, 30], 1, True)
    assert info["shapes"] == {"prompt_embeds": ["B", 512, 96], "text_ids": ["B", 512, 4]}


def test_the_index_is_json_for_programs_and_a_page_for_a_browser(http):
    assert http.get("/").json()["jobs"] == "/jobs"
    page = http.get("/", headers={"accept": "text/html,*/*"})
    assert page.headers["content-type"].startswith("text/html")
    assert "layerstack" in page.text


def test_the_interface_is_described(http):
    document = http.get("/openapi.json").json()
    assert {"/predict", "/jobs", "/jobs/{job_id}", "/jobs/{job_id}/parts/{index}"} <= set(document["paths"])
    for path in ("/predict", "/jobs"):
        for content in document["paths"][path]["post"]["requestBody"]["content"].values():
            reference = content["schema"].get("$ref", "#").rpartition("/")[2]
            assert reference in {"", "#", *document["components"]["schemas"]}


def test_an_unknown_path_or_method_is_a_problem_document(http):
    for response, status in (
        (http.get("/nowhere"), 404),
        (http.put("/predict"), 405),
        (http.put("/docs/static/x"), 405),
    ):
        assert response.status_code == status
        assert response.headers["content-type"] == "application/problem+json"
        assert (status == 405) == bool(response.headers.get("allow"))


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/docs", "/openapi.json"])
def test_head_is_answered_where_no_key_is_needed(http, path):
    assert http.head(path).status_code == 200


@pytest.mark.parametrize("path", ["/jobs/", "/docs/", "/health/"])
def test_a_slash_too_many_is_no_redirect_to_where_the_host_header_says(http, path):
    response = http.get(path, follow_redirects=False)
    assert (response.status_code, "location" in response.headers) == (404, False)


def test_without_a_worker_everything_but_health_is_503(lone_api, broker):
    url = lone_api(broker.url)
    assert status_of(f"{url}/health") == 200
    for response in (
        httpx.get(f"{url}/ready"),
        httpx.get(f"{url}/encoder"),
        httpx.post(f"{url}/predict", json={"prompt": "a"}),
        httpx.post(f"{url}/jobs", json={"prompts": ["a"]}),
    ):
        assert response.status_code == 503
        assert "no worker" in response.json()["detail"]
        assert int(response.headers["retry-after"]) > 0


def test_without_a_broker_requests_are_503_and_the_api_recovers(lone_api, broker):
    url = lone_api(broker.url)
    broker.process.send_signal(signal.SIGSTOP)
    broker.process.kill()
    broker.process.wait()
    response = httpx.post(f"{url}/predict", json={"prompt": "a"}, timeout=30)
    assert (response.status_code, response.json()["type"]) == (503, "urn:layerstack:problem:broker-unavailable")
    assert httpx.get(f"{url}/ready", timeout=30).json()["checks"]["broker"].startswith("does not answer")
    assert status_of(f"{url}/health") == 200


def test_a_storage_that_cannot_be_used_is_not_ready(lone_api, broker, spawn):
    url = lone_api(broker.url)
    port = free_port()
    process = spawn("api", port=port, broker_url=broker.url, storage="/dev/null/jobs")
    wait_for(lambda: status_of(f"http://127.0.0.1:{port}/health") == 200, process, process.log)
    checks = httpx.get(f"http://127.0.0.1:{port}/ready").json()["checks"]
    assert checks["storage"] == "cannot be used; the server's log says why"  # anybody may ask
    assert "/dev/null/jobs" in process.log.read_text()
    assert httpx.get(f"{url}/ready").json()["checks"]["storage"] == "ok"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_exit_code_0(spawn, broker, number):
    port = free_port()
    process = spawn("api", port=port, broker_url=broker.url)
    wait_for(lambda: status_of(f"http://127.0.0.1:{port}/health") == 200, process, process.log)
    process.send_signal(number)
    assert process.wait(10) == 0


def test_a_bad_setting_is_named(spawn):
    process = spawn("api", port="many")
    assert process.wait(30) == 1
    assert "LAYERSTACK_PORT='many'" in process.log.read_text()
