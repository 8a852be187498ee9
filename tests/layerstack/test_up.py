"""`layerstack up` as a real process, started and stopped as a user would."""

import signal
import socket
import subprocess
import time

import psutil
import pytest

import layerstack
from jobs.records import JobStatus
from tests.support import clean_environment, free_port, layerstack_command, status_of, wait_for


@pytest.fixture
def up(tmp_path):
    """Start `layerstack up` with arguments; what still runs at the end is killed."""
    started = []

    def start(*words, **options):
        log = tmp_path / f"up-{len(started)}.log"
        command = [layerstack_command(), "up", *map(str, words)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=clean_environment(), **options)
        process.log = log
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def children_of(process):
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_is_healthy_before_it_is_ready_and_a_signal_ends_all_of_it(up, tmp_path, tiny, number):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = up("--port", port, "--storage", tmp_path / "storage", "--model", tiny)
    wait_for(lambda: status_of(f"{url}/health") == 200, process, process.log)
    assert status_of(f"{url}/ready") == 503
    wait_for(lambda: status_of(f"{url}/ready") == 200, process, process.log)
    children = children_of(process)
    assert len(children) == 3
    process.send_signal(number)
    assert process.wait(10) == 0
    assert not any(child.is_running() for child in children)
    assert status_of(f"{url}/health") is None


def test_a_job_goes_on_when_it_is_started_again(up, tmp_path, tiny):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = ("--port", port, "--storage", tmp_path / "storage", "--model", tiny)
    first = up(*words)
    wait_for(lambda: status_of(f"{url}/ready") == 200, first, first.log)
    with layerstack.Client(url) as client:
        job = client.submit([f"prompt {n}" for n in range(150)], {"chunk_rows": 50})
        wait_for(lambda: client.job(job.id).num_parts_done > 0, first, first.log)
        first.send_signal(signal.SIGINT)
        assert first.wait(10) == 0
        second = up(*words)
        wait_for(lambda: status_of(f"{url}/ready") == 200, second, second.log)
        wait_for(lambda: client.job(job.id).status == JobStatus.SUCCEEDED, second, second.log)
        assert client.fetch(job.id, tmp_path / "got").rows == 150


def test_without_a_model_it_makes_the_demo_checkpoint_and_says_that_its_weights_are_random(up, tmp_path):
    port = free_port()
    process = up("--port", port, "--storage", tmp_path / "storage")
    wait_for(lambda: status_of(f"http://127.0.0.1:{port}/ready") == 200, process, process.log)
    assert (tmp_path / "storage" / "demo-encoder-mistral3" / "text_encoder" / "model.safetensors").is_file()
    assert "RANDOM" in process.log.read_text()


def test_a_signal_while_the_model_loads_ends_it_too(up, tmp_path, tiny):
    port = free_port()
    process = up("--port", port, "--storage", tmp_path / "storage", "--model", tiny)
    wait_for(lambda: len(children_of(process)) == 3, process, process.log)
    children = children_of(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert not any(child.is_running() for child in children)


def test_a_port_in_use_is_told_and_nothing_is_started(up, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = up("--port", port, "--storage", tmp_path / "storage")
        assert process.wait(20) == 1
    assert f"127.0.0.1:{port} cannot be listened on (Address already in use)" in process.log.read_text()
    assert not (tmp_path / "storage").exists()


def test_a_storage_in_use_is_told(up, stack):
    process = up("--port", free_port(), "--storage", stack.storage)
    assert process.wait(20) == 1
    assert "is in use by another `layerstack up`" in process.log.read_text()


def test_a_model_that_is_none_ends_it_with_the_reason(up, tmp_path):
    (tmp_path / "empty").mkdir()
    process = up("--port", free_port(), "--storage", tmp_path / "storage", "--model", tmp_path / "empty")
    assert process.wait(60) == 1
    log = process.log.read_text()
    assert f"{tmp_path}/empty is no checkpoint" in log
    assert "config.json" in log
    assert "Traceback" not in log


@pytest.mark.skipif("sys.platform != 'linux'", reason="only Linux ends children with their parent")
def test_not_even_sigkill_leaves_anything_running(up, tmp_path, tiny):
    process = up("--port", free_port(), "--storage", tmp_path / "storage", "--model", tiny)
    wait_for(lambda: len(children_of(process)) == 3, process, process.log)
    time.sleep(0.5)
    children = children_of(process)
    process.kill()
    wait_for(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children))
