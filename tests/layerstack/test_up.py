"""`layerstack up` as a real process, started and stopped as a user would."""

import fcntl
import os
import pty
import signal
import socket
import subprocess
import termios
import time
from contextlib import contextmanager, suppress

import psutil
import pytest

import layerstack
from jobs.records import JobStatus
from tests.support import clean_environment, free_port, layerstack_command, status_of, wait_for

MARKS = {"broker": "broker.sock", "api": "-m api", "worker": "-m worker"}


def hear_hangups():
    """Have a child that is about to begin end by SIGHUP, also if these tests were started with nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@contextmanager
def launcher(folder):
    """Start `layerstack up` with arguments; what still runs at the end is killed."""
    started = []

    def start(*words, env=None, **options):
        log = folder / f"up-{len(started)}.log"
        command = [layerstack_command(), "up", *map(str, words)]
        environment = clean_environment() | (env or {})
        options.setdefault("preexec_fn", hear_hangups)
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, **options)
        process.log = log
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def up(tmp_path):
    with launcher(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def ready_up(tmp_path_factory, tiny):
    """A stack that is ready, for tests that end some of its children and leave it ready again."""
    folder = tmp_path_factory.mktemp("up")
    port = free_port()
    with launcher(folder) as start:
        process = start("--port", port, "--storage", "storage", "--model", tiny, cwd=folder)
        process.url = f"http://127.0.0.1:{port}"
        process.storage = folder / "storage"
        wait_for(lambda: status_of(f"{process.url}/ready") == 200, process, process.log)
        wait_for(lambda: "ready: http" in process.log.read_text(), process, process.log)
        yield process
        process.terminate()
        assert process.wait(10) == 0


def children_of(process):
    return psutil.Process(process.pid).children(recursive=True)


def named_children_of(process):
    """The children that have begun, by name."""
    found = {}
    for child in children_of(process):
        with suppress(psutil.Error):  # it has ended meanwhile
            command = " ".join(child.cmdline())
            found |= {name: child for name, mark in MARKS.items() if mark in command}
    return found


def said_until_ready(process, signals):
    """Send signals to children -> what `up` and its children say from then until `up` says that it is ready."""
    before = len(process.log.read_text())
    children = named_children_of(process)
    for name, number in signals.items():
        children[name].send_signal(number)
    wait_for(lambda: "ready: http" in process.log.read_text()[before:], process, process.log)
    return process.log.read_text()[before:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
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
        job = client.jobs.submit([f"prompt {n}" for n in range(150)], {"chunk_rows": 50})
        wait_for(lambda: job.refresh().num_parts_done > 0, first, first.log)
        first.send_signal(signal.SIGINT)
        assert first.wait(10) == 0
        second = up(*words)
        wait_for(lambda: status_of(f"{url}/ready") == 200, second, second.log)
        wait_for(lambda: job.refresh().status == JobStatus.SUCCEEDED, second, second.log)
        assert job.download(tmp_path / "got").rows == 150


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


def test_a_terminal_that_is_closed_ends_it_all(tmp_path, tiny):
    """Without anywhere to say so: what it writes from then on fails."""
    ours, theirs = pty.openpty()
    command = [layerstack_command(), "up", "--port", str(free_port()), "--storage", "storage", "--model", str(tiny)]

    def get_terminal():
        hear_hangups()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    options = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "cwd": tmp_path, "env": clean_environment()}
    options |= {"start_new_session": True, "preexec_fn": get_terminal}
    with subprocess.Popen(command, **options) as process:
        os.close(theirs)
        wait_for(lambda: len(children_of(process)) == 3, process)
        children = children_of(process)
        os.close(ours)
        assert process.wait(10) == 0
    assert not any(child.is_running() for child in children)


def test_with_nohup_it_outlives_its_terminal(up, tmp_path, tiny):
    process = up(
        "--port", free_port(), "--storage", tmp_path / "storage", "--model", tiny,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    wait_for(lambda: len(children_of(process)) == 3, process, process.log)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.terminate()
    assert process.wait(10) == 0


def test_a_port_in_use_is_told_and_nothing_is_started(up, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = up("--port", port, "--storage", tmp_path / "storage")
        assert process.wait(20) == 1
    assert f"127.0.0.1:{port} cannot be listened on (Address already in use)" in process.log.read_text()
    assert not (tmp_path / "storage").exists()


def test_without_keys_it_does_not_listen_where_others_reach_it(up, tmp_path):
    process = up("--storage", tmp_path / "storage", env={"LAYERSTACK_HOST": "0.0.0.0"})  # noqa: S104 - it refuses
    assert process.wait(30) == 1
    said = process.log.read_text()
    for name in ("LAYERSTACK_HOST", "LAYERSTACK_API_KEYS", "LAYERSTACK_ALLOW_WITHOUT_KEYS"):
        assert name in said
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


@pytest.mark.parametrize("name", MARKS)
def test_a_child_that_is_killed_is_started_again_and_the_others_live_on(ready_up, name):
    before = named_children_of(ready_up)
    said = said_until_ready(ready_up, {name: signal.SIGKILL})
    assert said.count("starting it again") == 1
    assert f"the {name} was killed by SIGKILL; starting it again in 1 s\n" in said
    if name == "worker":  # the one that died does not count until its announcement expires
        assert "fingerprint" in said[: said.index("ready: http")]
    after = named_children_of(ready_up)
    assert [other for other in MARKS if after[other].pid != before[other].pid] == [name]
    with layerstack.Client(ready_up.url) as client:
        assert client.predict("a fox").prompt_embeds.shape[0] == 1


def test_a_child_that_ends_by_itself_with_exit_code_0_is_started_again(ready_up):
    said = said_until_ready(ready_up, {"api": signal.SIGTERM})
    assert "the api ended with exit code 0; starting it again in" in said


def test_the_children_get_the_full_path_of_the_storage(ready_up):
    environment = named_children_of(ready_up)["worker"].environ()
    assert environment["LAYERSTACK_STORAGE"] == environment["LAYERSTACK_LOCAL_DIR"] == str(ready_up.storage)


def test_what_is_no_result_lies_in_the_local_folder_and_the_url_of_an_object_store_is_handed_on(up, tmp_path):
    variables = {"LAYERSTACK_LOCAL_DIR": "local"}
    process = up("--port", free_port(), "--storage", "s3://bucket/a/b", env=variables, cwd=tmp_path)
    wait_for(lambda: "api" in named_children_of(process), process, process.log)
    environment = named_children_of(process)["api"].environ()
    assert environment["LAYERSTACK_STORAGE"] == "s3://bucket/a/b"
    assert environment["LAYERSTACK_LOCAL_DIR"] == str(tmp_path / "local")
    assert (tmp_path / "local" / "broker").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "up-0.log"]


def test_children_killed_before_it_was_ready_are_started_again(up, tmp_path, tiny):
    process = up("--port", free_port(), "--storage", tmp_path / "storage", "--model", tiny)
    wait_for(lambda: len(named_children_of(process)) == 3, process, process.log)
    for child in named_children_of(process).values():
        child.kill()
    wait_for(lambda: process.log.read_text().count("starting it again in 1 s") == 3, process, process.log)
    wait_for(lambda: len(named_children_of(process)) == 3, process, process.log)


def test_a_signal_while_a_child_waits_to_be_started_ends_it_at_once(up, tmp_path, tiny):
    process = up("--port", free_port(), "--storage", tmp_path / "storage", "--model", tiny)
    for wait_s in (1, 2, 4):
        wait_for(lambda: len(named_children_of(process)) == 3, process, process.log)
        children = named_children_of(process)
        children["api"].kill()
        line = f"the api was killed by SIGKILL; starting it again in {wait_s} s"
        wait_for(lambda line=line: line in process.log.read_text(), process, process.log)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    assert time.monotonic() - asked < wait_s
    assert not any(child.is_running() for child in children.values())


def test_a_broker_that_cannot_start_ends_it_and_its_log_is_named(up, tmp_path):
    folder = tmp_path / "storage" / "broker" / "appendonlydir"
    folder.mkdir(parents=True)
    (folder / "appendonly.aof.manifest").write_text("nonsense")
    process = up("--port", free_port(), "--storage", tmp_path / "storage")
    assert process.wait(20) == 1
    assert f"the broker ended with exit code 1; {folder.parent}/broker.log says why" in process.log.read_text()


def test_where_a_model_should_be_mounted_the_demo_encoder_takes_nobodys_place(up, tmp_path):
    process = up("--port", free_port(), "--storage", tmp_path / "s", env={"LAYERSTACK_MODEL_MOUNT": str(tmp_path)})
    assert process.wait(30) == 1
    assert f"LAYERSTACK_MODEL_MOUNT='{tmp_path}' holds no model" in process.log.read_text()


def test_a_mounted_model_is_served(up, tmp_path, tiny):
    port = free_port()
    mount = {"LAYERSTACK_MODEL_MOUNT": str(tiny), "LAYERSTACK_MODEL": "/nowhere"}
    process = up("--port", port, "--storage", tmp_path / "s", env=mount)
    wait_for(lambda: status_of(f"http://127.0.0.1:{port}/ready") == 200, process, process.log)
    assert f"the model is {tiny}" in process.log.read_text()
    process.terminate()
    assert process.wait(20) == 0
