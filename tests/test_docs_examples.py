"""What the pages for beginners show works as it is written."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import clean_environment, layerstack_command

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page, language):
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def run(stack):
    """Run a program in a folder, against the stack; returns its standard output."""
    environment = clean_environment() | {"LAYERSTACK_URL": stack.url, "OMP_NUM_THREADS": "1"}

    def call(folder, *command):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return call


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory, run):
    """A folder in which somebody has followed the quick start up to its Python."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "captions.txt").write_text("\n".join(f"{n} foxes" for n in range(8)), encoding="utf-8")
    up, *commands = "".join(blocks("quickstart.md", "sh")[1:3]).splitlines()
    assert shlex.split(up) == ["layerstack", "up"]  # the stack is there
    job_id = ""
    for line in commands:
        words = [job_id if word == "ID" else word for word in shlex.split(line, comments=True)]
        said = run(folder, layerstack_command(), *words[1:])
        if "submit" in words:
            job_id = said
    return folder


def test_the_quick_start_is_six_commands():
    lines = "".join(blocks("quickstart.md", "sh")[1:3]).splitlines()
    assert len([line for line in lines if line.startswith("layerstack ")]) == len(lines) == 6


def test_the_commands_of_the_quick_start_leave_what_they_say(quick_start):
    assert {path.name for path in quick_start.iterdir()} >= {"fox.safetensors", "captions"}


def test_the_python_of_the_quick_start_runs(quick_start, run):
    said = run(quick_start, sys.executable, "-c", "\n".join(blocks("quickstart.md", "python")))
    assert said.splitlines()[-1] == "a red barn"


def test_the_python_of_the_page_for_trainers_runs(quick_start, run):
    run(quick_start, sys.executable, "-c", "\n".join(blocks("precompute.md", "python")))


def test_the_python_of_the_client_page_runs(tmp_path, run):
    said = run(tmp_path, sys.executable, "-c", "\n".join(blocks("client.md", "python")))
    assert "2 of 2" in said
    assert "404 job-not-found" in said
