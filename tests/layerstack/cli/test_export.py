import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import layerstack
from tests.layerstack.jobs_on_disk import D, dense, write_job


@pytest.fixture
def job(tmp_path):
    return write_job(tmp_path / "job", bad=(0, 5))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_safetensors_are_written_and_a_second_run_goes_on(run, job, out):
    code, said, err = run("export", job, "--to", "safetensors", "-o", out)
    assert (code, said.strip()) == (0, str(out))
    assert "8 prompts written, 0 were there, 2 have no embedding" in err
    np.testing.assert_array_equal(load_file(out / "00000003.safetensors")["prompt_embeds"], dense(3))
    code, said, _ = run("export", job, "--to", "safetensors", "-o", out, "--json")
    assert code == 0
    assert json.loads(said) == {
        "to": "safetensors", "output": str(out), "rows": 10, "written": 0, "kept": 8, "failed": 2, "overflowed": 0,
    }  # fmt: skip


def test_dense_parquet_is_a_job_that_can_be_read_and_inspected(run, job, out):
    assert run("export", job, "--to", "dense-parquet", "-o", out)[0] == 0
    np.testing.assert_array_equal(layerstack.read(out)[3]["prompt_embeds"], dense(3))
    assert "dense, float32" in run("inspect", out, "--verify")[1]


def test_values_that_a_dtype_cannot_hold_change_the_exit_code(run, tmp_path, out):
    rows = np.full((1, D), 1e5, np.float32)
    job = write_job(tmp_path / "job", count=2, rows=lambda _: rows)
    code, _, err = run("export", job, "--to", "safetensors", "-o", out, "--dtype", "float16")
    assert code == 4
    assert "2 prompts have values that float16 cannot hold, and were left out" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "pickle"], "pickle"),
        (["--to", "dense-parquet", "--layout", "own_rows"], "dense-parquet is dense"),
        (["--to", "dense-parquet", "--name", "id"], "no file of a prompt"),
        (["--to", "safetensors", "--compression", "zstd"], "not compressed"),
        ([], "--to"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(run, job, out, words, said):
    code, _, err = run("export", job, "-o", out, *words)
    assert code == 2
    assert said in err
    assert not out.exists()


def test_an_id_that_is_no_file_name_ends_it_in_one_line(run, tmp_path, out):
    job = write_job(tmp_path / "job", ids={3: "a/b"})
    code, _, err = run("export", job, "--to", "safetensors", "--name", "id", "-o", out)
    assert code == 1
    assert "the id 'a/b' is no name for a file" in err
    assert "Traceback" not in err
