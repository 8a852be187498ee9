"""The Dockerfiles and what they run, without Docker: `tests/containers` has what needs it."""

import os
import re
import subprocess
import sys
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from jobs.settings import Settings, load_settings
from tests.support import free_port, setting_of

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TEXT = {name: (ROOT / f"Dockerfile.{name}").read_text(encoding="utf-8") for name in ("api", "worker")}
LAST_STAGE = {name: text[text.rindex("\nFROM ") :] for name, text in TEXT.items()}
IGNORED = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()


def environment(name):
    block = re.search(r"^ENV ((?:.*\\\n)*.*)", LAST_STAGE[name], re.MULTILINE)[1]
    return dict(re.findall(r"(\w+)=(\S+)", block))


@pytest.mark.parametrize("name", TEXT)
def test_an_image_runs_as_a_user_with_a_number_other_than_root(name):
    assert re.findall(r"^USER (.*)$", LAST_STAGE[name], re.MULTILINE) == ["10001:10001"]


@pytest.mark.parametrize("name", TEXT)
def test_an_image_says_how_it_is_stopped_and_whether_it_is_well(name):
    assert "\nSTOPSIGNAL SIGTERM\n" in LAST_STAGE[name]
    assert "\nHEALTHCHECK " in LAST_STAGE[name]
    assert "org.opencontainers.image.revision" in LAST_STAGE[name]


@pytest.mark.parametrize("name", TEXT)
def test_an_image_is_of_this_version(name):
    assert re.findall(r"^ARG VERSION=(.*)$", TEXT[name], re.MULTILINE) == [PROJECT["project"]["version"]]


@pytest.mark.parametrize("name", TEXT)
def test_what_an_image_sets_are_settings(name, monkeypatch):
    ours = {variable: value for variable, value in environment(name).items() if variable.startswith("LAYERSTACK_")}
    assert {setting_of(variable) for variable in ours} <= set(Settings.model_fields)
    for variable, value in ours.items():
        monkeypatch.setenv(variable, value)
    settings = load_settings()
    assert (settings.port, settings.storage) == (7860, "/data")
    assert settings.model_mount == ("/repository" if name == "worker" else None)


@pytest.mark.parametrize("name", TEXT)
def test_an_image_holds_no_secret(name):
    set_here = set(environment(name)) | set(re.findall(r"^ARG (\w+)", TEXT[name], re.MULTILINE))
    assert "PATH" in set_here
    assert not [variable for variable in set_here if re.search("KEY|TOKEN|PASSWORD|SECRET", variable)]


def test_of_the_repository_only_the_packages_reach_an_image():
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    let_in = {line[1:] for line in IGNORED if line.startswith("!")}
    assert "*" in IGNORED
    assert let_in - set(packages) == {
        "LICENSE",
        "README.md",
        "deploy/healthcheck.py",
        "deploy/requirements.py",
        "pyproject.toml",
        "requirements.lock",
    }
    assert let_in > set(packages)


def requirements(*extras):
    command = [sys.executable, ROOT / "deploy" / "requirements.py", *extras]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.parametrize("extras", [["api"], ["api", "tracing", "worker"]])
def test_requirements_are_those_of_the_project_and_of_the_extras(extras):
    printed = requirements(*extras)
    lists = [PROJECT["project"]["dependencies"]]
    lists += [PROJECT["project"]["optional-dependencies"][extra] for extra in extras]
    assert set(printed) == {requirement for each in lists for requirement in each}
    assert len(printed) == len(set(printed))


def test_without_the_worker_nothing_needs_torch():
    printed = "\n".join(requirements("api", "tracing"))
    assert "torch" not in printed
    assert "transformers" not in printed


class Server:
    """Answers every GET with one status."""

    def __init__(self, status):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(f"{self.path} is {status}".encode())

            def log_message(self, *_args):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.thread = Thread(target=self.server.serve_forever)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_exc):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def healthcheck(default, **variables):
    command = [sys.executable, ROOT / "deploy" / "healthcheck.py", "THE_PORT", str(default), "/ready"]
    return subprocess.run(command, env=os.environ | variables, check=False, capture_output=True, text=True)


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (404, 1)])
def test_a_health_check_fails_unless_the_server_is_well(status, code):
    with Server(status) as server:
        ended = healthcheck(server.port)
    assert ended.returncode == code
    assert ended.stdout == f"{status} /ready is {status}\n"


def test_a_health_check_asks_at_the_port_that_is_set():
    with Server(200) as server:
        assert healthcheck(free_port(), THE_PORT=str(server.port)).returncode == 0
        assert healthcheck(server.port, THE_PORT="").returncode == 0


def test_a_health_check_fails_where_nobody_listens():
    ended = healthcheck(free_port())
    assert ended.returncode == 1
    assert "Connection refused" in ended.stderr
