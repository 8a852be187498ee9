"""Log lines, as a process of ours writes them."""

import json
import re
import subprocess
import sys

import httpx
import pytest

from tests.support import clean_environment, free_port, status_of, wait_for


def said(code, log_format):
    """The lines of a process that sets up its log and runs `code`."""
    begin = f"import logging, structlog\nfrom jobs import logs\nlogs.set_up('worker', 'INFO', {log_format!r})\n"
    command = [sys.executable, "-c", begin + "log = logging.getLogger('worker.x')\n" + code]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def records(code):
    return [json.loads(line) for line in said(code, "json").splitlines()]


@pytest.fixture
def log_of_api(spawn, tmp_path):
    """The parsed log of a running API, after a few requests."""
    port = free_port()
    process = spawn("api", port=port, broker_url=f"unix://{tmp_path}/nobody", storage=tmp_path / "s", log_format="json")
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: status_of(f"{url}/health") == 200, process, process.log)
    with httpx.Client(base_url=url) as client:
        client.get("/ready")
        client.get("/metrics")
        client.get("/jobs?limit=1", headers={"X-Request-ID": "mine-1", "Authorization": "Bearer secret"})
        client.get("/jobs/nothing%0A")
    process.terminate()
    assert process.wait(20) == 0
    return [json.loads(line) for line in process.log.read_text().splitlines()]


def test_every_line_of_the_api_is_json_and_a_request_has_one_with_its_id_and_how_it_went(log_of_api):
    listed, unknown = (line for line in log_of_api if line["logger"] == "api.access")
    assert listed["request_id"] == "mine-1"
    assert (listed["method"], listed["path"], listed["route"], listed["status"]) == (
        "GET",
        "/jobs?limit=1",
        "/jobs",
        200,
    )
    assert 0 < listed["duration_s"] < 60
    assert listed["sent_bytes"] > 0
    assert listed["role"] == "api"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", listed["timestamp"])
    assert unknown["request_id"] not in {"mine-1", None}
    assert unknown["path"] == "/jobs/nothing%0A"
    assert unknown["route"] == "/jobs/{job_id}"


def test_lines_within_a_request_tell_its_id_and_probes_have_none_of_their_own(log_of_api):
    complaint = next(line for line in log_of_api if line["logger"] == "api.metrics")
    assert complaint["level"] == "warning"
    assert len(complaint["request_id"]) == 26
    assert not any(line.get("path") in {"/health", "/ready", "/metrics"} for line in log_of_api)


def test_headers_are_in_no_line(log_of_api):
    assert "secret" not in json.dumps(log_of_api)


def test_an_exception_is_one_field():
    (record,) = records("try: 1 / 0\nexcept ZeroDivisionError: log.exception('chunk %d', 3)")
    assert record["event"] == "chunk 3"
    assert record["level"] == "error"
    assert record["exception"].endswith("ZeroDivisionError: division by zero")


def test_what_is_bound_is_in_each_line():
    code = "with structlog.contextvars.bound_contextvars(job_id='01J', chunk=3): log.info('a')\nlog.info('b')"
    first, second = records(code)
    assert (first["job_id"], first["chunk"]) == ("01J", 3)
    assert "job_id" not in second


def test_arguments_that_libraries_give_a_line_stay_out_of_it():
    (record,) = records("logging.getLogger('celery').warning('m', extra={'data': {'prompt': 'a fox'}})")
    assert "fox" not in json.dumps(record)


def test_what_nobody_catches_and_warnings_are_json_as_well():
    code = (
        "import threading, warnings\n"
        "warnings.warn('old')\n"
        "thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()\n"
        "raise ValueError('the end')"
    )
    warned, in_thread, last = records(code)
    assert "UserWarning: old" in warned["event"]
    assert in_thread["exception"].endswith("ZeroDivisionError: division by zero")
    assert (last["level"], last["event"]) == ("critical", "uncaught: the end")


def test_a_line_for_people_has_time_level_role_logger_and_what_it_does_not_say_itself():
    code = (
        "with structlog.contextvars.bound_contextvars(job_id='01J', chunk=3, request_id='r1'):\n"
        "    log.info('chunk 3 of job 01J is done')\n"
        "    log.warning('slow')"
    )
    first, second = said(code, "console").splitlines()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+ INFO    worker worker\.x: chunk 3 .* done request_id=r1", first
    )
    assert second.endswith("WARNING worker worker.x: slow chunk=3 job_id=01J request_id=r1")


def test_libraries_speak_from_warning_on_only():
    code = (
        "logging.getLogger('other').info('a')\nlogging.getLogger('other').warning('b')\nlog.debug('c')\nlog.info('d')"
    )
    assert [record["event"] for record in records(code)] == ["b", "d"]


def test_an_unknown_format_is_told_before_anything_starts():
    environment = clean_environment() | {"LAYERSTACK_LOG_FORMAT": "xml"}
    done = subprocess.run([sys.executable, "-m", "api"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "LAYERSTACK_LOG_FORMAT='xml'" in done.stderr
    assert "Traceback" not in done.stderr
