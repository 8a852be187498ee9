import hashlib
import json

import pytest
from safetensors.numpy import load_file

import layerstack
from jobs.settings import load_settings
from tests.support import wait_for


def test_predict_shows_shapes_and_writes_safetensors(run, tmp_path):
    code, out, _ = run("predict", "a fox", "a hen", "-o", tmp_path / "x.safetensors", "--json")
    assert code == 0
    assert json.loads(out)["prompt_embeds"] == [2, 512, 96]
    tensors = load_file(tmp_path / "x.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "prompt_embeds": (2, 512, 96),
        "text_ids": (2, 512, 4),
    }


def test_a_job_is_submitted_shown_listed_and_fetched(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\na hen\n")
    code, out, err = run("jobs", "submit", prompts, "--layout", "dense")
    job_id = out.strip()
    assert (code, len(job_id)) == (0, 26)
    assert "2 prompts in 1 parts" in err
    wait_for(lambda: json.loads(run("jobs", "show", job_id, "--json")[1])["status"] == "succeeded")
    assert "2 of 2 prompts" in run("jobs", "show", job_id)[1]
    assert job_id in run("jobs", "list")[1]
    assert json.loads(run("jobs", "list", "--limit", "1", "--json")[1])[0]["id"] == job_id
    code, out, _ = run("jobs", "fetch", job_id, "-o", tmp_path / "got")
    assert code == 0
    assert len(layerstack.read(tmp_path / "got")) == 2


def test_without_a_server_it_says_what_to_do(run):
    code, out, err = run("jobs", "list", url="http://127.0.0.1:9")
    assert (code, out) == (3, "")
    assert "http://127.0.0.1:9" in err
    assert "layerstack up" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["jobs", "show", "nonsense"], "no job 'nonsense'"),
        (["jobs", "fetch", "nonsense", "-o", "/nowhere"], "no job 'nonsense'"),
        (["jobs", "submit", "/nowhere/prompts.txt"], "/nowhere/prompts.txt: No such file"),
        (["jobs", "submit", __file__], "neither application/json nor a prompt file"),
    ],
)
def test_an_error_is_one_line_that_names_what_is_wrong(run, words, message):
    code, _, err = run(*words)
    assert code == 1
    assert message in err
    assert "Traceback" not in err


def test_a_server_with_keys_takes_the_one_of_the_environment_and_says_so_without(run, keyed_url, monkeypatch):
    code, _, err = run("jobs", "list", url=keyed_url)
    assert code == 1
    assert "LAYERSTACK_API_KEY" in err
    monkeypatch.setenv("LAYERSTACK_API_KEY", "ls_of-ann")
    assert run("jobs", "list", "--json", url=keyed_url)[:2] == (0, "[]\n")


def test_a_new_key_comes_with_the_entry_by_which_a_server_knows_it(run):
    code, out, _ = run("keys", "new", "ann", "--json")
    made = json.loads(out)
    digest = hashlib.sha256(made["key"].encode()).hexdigest()
    assert (code, made["name"], made["entry"]) == (0, "ann", f"ann:{digest}")
    assert load_settings(api_keys=made["entry"]).api_keys == {"ann": digest}
    assert made["key"].startswith("ls_")
    assert len(made["key"]) > 40


def test_no_two_keys_are_the_same_and_a_person_sees_key_and_entry(run):
    first, second = (run("keys", "new", "ann")[1].split() for _ in range(2))
    assert first[::2] == ["key", "entry"]
    assert first[3] == f"ann:{hashlib.sha256(first[1].encode()).hexdigest()}"
    assert not set(first[1::2]) & set(second[1::2])


@pytest.mark.parametrize("name", ["", "a:b", "a b", "a,b", "x" * 65])
def test_a_name_that_no_entry_can_have_is_wrong_usage(run, name):
    code, out, err = run("keys", "new", name)
    assert (code, out) == (2, "")
    assert "NAME" in err


def test_wrong_usage_has_its_own_exit_code(run):
    assert run("jobs", "list", "--limit", "0")[0] == 2
    assert run("nonsense")[0] == 2


def test_the_version_is_printed(run):
    assert run("version")[1].strip() == layerstack.__version__
