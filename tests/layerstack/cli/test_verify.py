import json
import shutil
from dataclasses import replace

import pytest
from safetensors.numpy import load_file, save_file

from encoder import tiny as tiny_checkpoint
from layerstack.client import Client
from tests.layerstack.servers import answering, in_turn, problem


@pytest.fixture
def other(tmp_path):
    """A checkpoint with other weights everywhere."""
    tiny_checkpoint.write(tmp_path / "other", hidden=32, seed=7)
    return tmp_path / "other"


@pytest.fixture
def changed(tiny, tmp_path):
    """The server's checkpoint with other weights in its layer 15 only."""
    folder = tmp_path / "changed"
    shutil.copytree(tiny, folder)
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    for name in (name for name in tensors if ".layers.14.mlp." in name and "vision" not in name):
        tensors[name] = tensors[name] * 1.1
    save_file(tensors, weights, {"format": "pt"})
    return folder


def test_a_server_with_the_same_model_is_the_same(run, stack, tiny):
    code, out, err = run("verify", stack.url, "--model", tiny, "--device", "cpu")
    assert code == 0, err
    assert "the same, of 6 prompts in float32" in out
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["10", "20", "30"]


def test_one_with_another_checkpoint_is_not_and_the_layer_and_its_error_are_named(run, stack, other):
    code, out, _ = run("verify", stack.url, "--model", other)
    assert code == 4
    assert "layer 10 differs: relative error " in out
    assert "fingerprint differs" in out


def test_of_a_changed_layer_the_first_one_behind_it_is_named(run, stack, changed, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"a fox"\n{"id": "7", "prompt": "a hen"}\n')
    code, out, _ = run("verify", stack.url, "--model", changed, "--prompts", prompts, "--json")
    assert code == 4
    told = json.loads(out)
    assert told["differences"][0].startswith("layer 20 differs: relative error")
    assert [layer["wrong_rows"] > 0 for layer in told["layers"]] == [False, True, True]
    assert told["prompts"] == 2
    assert told["fingerprints"]["here"] != told["fingerprints"]["there"]


def test_it_says_so_when_it_waits_for_a_busy_server(run, tiny):
    with answering(in_turn(problem(503, "no-worker", retry_after=0), problem(404, "not-found"))) as server:
        code, _, err = run("verify", server.url, "--model", tiny)
    assert code == 1
    assert "no-worker; trying again in " in err


def test_another_size_is_told(run, stack, tmp_path):
    tiny_checkpoint.write(tmp_path / "other", hidden=16)
    code, out, _ = run("verify", stack.url, "--model", tmp_path / "other")
    assert code == 4
    assert "prompt_embeds differ: (4, 512, 96) there, (4, 512, 48) here" in out


def test_the_servers_address_may_come_from_the_environment(run, tiny, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n")
    code, out, _ = run("verify", "--model", tiny, "--prompts", prompts, "--json")
    assert (code, json.loads(out)["same"]) == (0, True)


def test_a_mounted_model_is_the_model_as_it_is_for_encode(run, tiny, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n")
    monkeypatch.setenv("LAYERSTACK_MODEL_MOUNT", str(tiny))
    code, out, err = run("verify", "--prompts", prompts, "--json")
    assert (code, json.loads(out)["same"]) == (0, True), err


def test_each_answer_has_to_have_the_fingerprint(run, stack, tiny, monkeypatch):
    answers = []

    def predict(client, prompts):
        answers.append(prompts)
        answer = real(client, prompts)
        return replace(answer, fingerprint="another") if len(answers) == 1 else answer  # of several workers, say

    real = Client.predict
    monkeypatch.setattr(Client, "predict", predict)
    code, out, _ = run("verify", stack.url, "--model", tiny, "--json")
    told = json.loads(out)
    assert (code, len(answers)) == (4, 2)
    assert [each.split(":")[0] for each in told["differences"]] == ["fingerprint differs"]
    assert told["fingerprints"]["there"] == "another"


def test_without_a_model_it_is_wrong_usage(run, stack):
    code, _, err = run("verify", stack.url)
    assert code == 2
    assert "name the model" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["verify", "http://127.0.0.1:9", "--model", "/nowhere"], 3, "layerstack up"),
        (["verify", "--model", "/nowhere"], 1, "/nowhere: no such folder"),
        (["verify", "--model", "/nowhere", "--prompts", "/nowhere/p.txt"], 1, "/nowhere/p.txt: No such file"),
        (["verify", "--model", "/nowhere", "--prompts", "/dev/null"], 1, "/dev/null: not a prompt file"),
        (["verify", "--model", "/nowhere", "--prompts", "{}/empty.txt"], 1, "empty.txt: there is no prompt in it"),
    ],
)
def test_what_is_in_the_way_is_one_line(run, tmp_path, words, code, message):
    (tmp_path / "empty.txt").touch()
    ended, _, err = run(*(word.format(tmp_path) for word in words))
    assert (ended, message in err) == (code, True), err
    assert "Traceback" not in err
