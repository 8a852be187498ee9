"""The comparison of a server with this machine."""

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from encoder.tiny import write

DRIVER = Path(__file__).parents[2] / "examples" / "driver.py"


def drive(*words):
    return subprocess.run([sys.executable, DRIVER, *words], check=False, capture_output=True, text=True)


@pytest.fixture(scope="module")
def driver():
    spec = spec_from_file_location("driver", DRIVER)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_server_with_the_same_model_is_found_the_same(stack, tiny):
    ended = drive(stack.url, str(tiny))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "rows: 0 of 1536 differ" in ended.stdout
    assert ended.stdout.endswith("\nthe same\n")


@pytest.mark.parametrize(("hidden", "said"), [(32, "NOT the same, in float32"), (64, "NOT the same: prompt_embeds: ")])
def test_one_with_another_model_is_not(stack, tmp_path, hidden, said):
    write(tmp_path / "other", hidden, seed=7)
    ended = drive(stack.url, str(tmp_path / "other"))
    assert ended.returncode == 1
    assert said in ended.stdout, ended.stderr


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_one_wrong_row_of_many_is_found(driver, wrong):
    here = torch.randn(4, 512, 8)
    there = here.clone()
    there[3, 17, 0] += wrong
    errors = driver.row_errors(there, here)
    assert [tuple(place) for place in (~(errors <= 1e-4)).nonzero().tolist()] == [(3, 17)]


def test_another_shape_is_told(driver):
    with pytest.raises(AssertionError, match=r"\(1, 512, 8\) there, \(1, 512, 4\) here"):
        driver.row_errors(torch.zeros(1, 512, 8), torch.zeros(1, 512, 4))


def test_an_empty_file_is_told(stack, tmp_path):
    (tmp_path / "prompts.txt").touch()
    ended = drive(stack.url, "/nowhere", "--prompts", str(tmp_path / "prompts.txt"))
    assert ended.returncode == 2
    assert "prompts.txt is empty" in ended.stderr
