"""The comparison of a server with this machine."""

import subprocess
import sys
from pathlib import Path

import pytest

from encoder.tiny import write

DRIVER = Path(__file__).parents[2] / "examples" / "driver.py"


def drive(*words):
    return subprocess.run([sys.executable, DRIVER, *words], check=False, capture_output=True, text=True)


def test_a_server_with_the_same_model_is_found_the_same(stack, tiny):
    ended = drive(stack.url, str(tiny))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [line.partition(":")[0] for line in ended.stdout.splitlines()[:3]] == ["layer 10", "layer 20", "layer 30"]
    assert ended.stdout.endswith("\nthe same, 3072 rows in float32\n")


@pytest.mark.parametrize(
    ("hidden", "said"), [(32, "layer 10 differs: relative error"), (64, "prompt_embeds differ: (4, 512, 96) there")]
)
def test_one_with_another_model_is_not(stack, tmp_path, hidden, said):
    write(tmp_path / "other", hidden, seed=7)
    ended = drive(stack.url, str(tmp_path / "other"))
    assert ended.returncode == 1
    assert said in ended.stdout, ended.stderr
    assert "fingerprint differs" in ended.stdout


def test_a_prompt_file_is_read_as_by_encode(stack, tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\u2028fox\fin the snow\na hen\n")
    ended = drive(stack.url, str(tiny), "--prompts", str(tmp_path / "prompts.txt"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.endswith("\nthe same, 1024 rows in float32\n")


def test_an_empty_file_is_told(stack, tmp_path):
    (tmp_path / "prompts.txt").touch()
    ended = drive(stack.url, "/nowhere", "--prompts", str(tmp_path / "prompts.txt"))
    assert ended.returncode == 2
    assert "prompts.txt is empty" in ended.stderr
