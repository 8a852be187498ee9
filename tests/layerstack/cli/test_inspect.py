import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.layerstack.jobs_on_disk import flip_byte, write_job
from tests.support import clean_environment, layerstack_command, wait_for


@pytest.fixture
def job(tmp_path):
    return write_job(tmp_path / "job", bad=(0, 5), cut=(4,))


def test_a_person_sees_what_is_there_and_what_it_saves(run, job):
    code, out, _ = run("inspect", job)
    assert code == 0
    for text in (
        "own_rows, float32", "10, 2 failed, 1 truncated", "10, 20, 30", "times as much", "prompt_embeds",
        "large_binary", "own rows", "p95", "0  id id0: why", "5  id id5: why",
    ):  # fmt: skip
        assert text in out


def test_a_program_gets_json(run, job):
    code, out, _ = run("inspect", job, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["rows"], found["failed"], found["parts"], found["layers"]) == (10, 2, 3, [10, 20, 30])
    assert found["times_smaller"] == pytest.approx(found["dense_bytes"] / found["bytes"], abs=0.01)
    assert (found["damaged"], found["plot"]) == (None, None)
    assert found["errors"][0] == {"index": 0, "id": "id0", "error": "why"}


def test_verify_names_a_damaged_part_and_the_exit_code_tells(run, job):
    code, out, _ = run("inspect", job, "--verify")
    assert code == 0
    assert "every part is what the manifest says" in out
    flip_byte(job / "parts" / "00001.parquet")
    code, out, err = run("inspect", job, "--verify")
    assert (code, out) == (4, "")
    assert "00001.parquet is damaged: its SHA-256 is not the manifest's" in err
    code, out, _ = run("inspect", job, "--verify", "--json")
    assert code == 4
    assert json.loads(out)["damaged"] == [{"part": "00001.parquet", "reason": "its SHA-256 is not the manifest's"}]


def test_verify_says_what_makes_a_damaged_part_anew(run, job):
    flip_byte(job / "parts" / "00001.parquet")
    _, _, err = run("inspect", job, "--verify")
    assert "1 part is not what the manifest says; `layerstack jobs fetch 01ARZ3NDEKTSV4RRFFQ69G5FAV -o " in err
    flip_byte(job / "parts" / "00002.parquet")
    assert "2 parts are not what the manifest says" in run("inspect", job, "--verify")[2]


def test_verify_does_not_say_that_a_part_is_right_which_the_manifest_does_not_know(run, job):
    shutil.copy(job / "parts" / "00000.parquet", job / "parts" / "00099.parquet")
    code, out, err = run("inspect", job / "parts" / "00099.parquet", "--verify")
    assert (code, out) == (1, "")
    assert "the manifest does not know 00099.parquet" in err
    code, out, err = run("inspect", job, "--verify")
    assert (code, out) == (4, "")
    assert "00099.parquet does not belong there: the manifest does not know it" in err
    assert "layerstack jobs fetch" not in err


def test_verify_writes_nothing_to_standard_error_where_that_is_no_terminal(run, job):
    assert run("inspect", job, "--verify")[2] == ""


def test_a_part_that_is_missing_is_damage_to_verify(run, job):
    (job / "parts" / "00002.parquet").unlink()
    code, _, err = run("inspect", job, "--verify")
    assert code == 4
    assert "00002.parquet is damaged: it is missing" in err


def test_a_figure_is_drawn_with_the_tokens_of_the_model(run, job, tmp_path, tiny):
    code, out, err = run("inspect", job, "--plot", tmp_path / "a.png", "--model", tiny, "--json")
    assert code == 0
    assert json.loads(out)["plot"] == str(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "the tokenizer makes 3 tokens of this prompt, its rows are 2" in err


def test_without_a_tokenizer_rows_are_numbered_and_it_says_why(run, job, tmp_path):
    code, _, err = run("inspect", job, "--plot", tmp_path / "a.svg", "--prompt", 3, "--model", tmp_path / "none")
    assert code == 0
    assert "Rows are numbered" in err
    assert "none: no such folder" in err
    assert (tmp_path / "a.svg").is_file()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--plot", "a.jpg"], 2, ".png, .svg, .pdf"),
        (["--prompt", 99], 2, "--plot"),
        (["--plot", "a.png", "--prompt", 5], 1, "row 5 has no embedding: why"),
        (["--plot", "a.png", "--prompt", 10], 1, "the rows are 0 to 9"),
    ],
)
def test_a_figure_that_cannot_be_is_refused(run, job, words, code, said):
    found, _, err = run("inspect", job, *words)
    assert found == code
    assert said in err


def test_one_part_is_no_plural(run, job):
    out = run("inspect", job / "parts" / "00001.parquet")[1]
    assert re.search(r"^parts +1, \d\.\d kB, compression none$", out, re.MULTILINE)


def test_a_path_without_parts_is_named(run, tmp_path):
    code, _, err = run("inspect", tmp_path)
    assert code == 1
    assert "no parts" in err


def test_a_job_of_a_server_is_inspected_without_downloading_it(stack):
    with stack.http() as http:
        job = http.post("/jobs", json={"prompts": ["a fox", "a hen"]}).json()
        wait_for(lambda: http.get(f"/jobs/{job['id']}").json()["status"] == "succeeded")
    words = [layerstack_command(), "inspect", f"{stack.url}/jobs/{job['id']}", "--verify", "--json"]
    found = subprocess.run(words, check=True, capture_output=True, env=clean_environment())
    assert (json.loads(found.stdout)["rows"], json.loads(found.stdout)["damaged"]) == (2, [])


def test_no_torch_is_imported_to_count(job):
    code = "import sys; from layerstack import cli; cli.app(standalone_mode=False); sys.exit('torch' in sys.modules)"
    words = [sys.executable, "-c", code, "inspect", str(job)]
    assert subprocess.run(words, check=False, env=clean_environment(), capture_output=True).returncode == 0


def test_the_command_is_called_inspect():
    found = subprocess.run([layerstack_command(), "inspect", "--help"], check=True, capture_output=True, text=True)
    assert "--verify" in found.stdout
