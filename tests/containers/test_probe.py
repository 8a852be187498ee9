"""The probe of a compose stack, on a local one: what it asks Docker aside."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support import free_port

PROBE = Path(__file__).with_name("probe.py")


def probe(url, **variables):
    command = [sys.executable, "-I", PROBE, "--http-only"]  # -I: it has to do with the standard library
    environment = os.environ | {"LAYERSTACK_URL": url} | variables
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)


def test_it_finds_a_stack_well(stack):
    ended = probe(stack.url)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for line in ("ready      broker, storage, encoder", "workers    1 loaded", "job        600 rows in 60 parts"):
        assert line in ended.stdout


def test_it_fails_where_there_is_none():
    ended = probe(f"http://127.0.0.1:{free_port()}")
    assert ended.returncode == 1
    assert ended.stdout.startswith("ready      FAILED: ")


def test_it_fails_if_workers_are_missing(stack):
    ended = probe(stack.url, WORKERS="2", PATIENCE_S="1")
    assert ended.returncode == 1
    assert "workers    FAILED: waited 1 s for /encoder to know of 2 workers" in ended.stdout
