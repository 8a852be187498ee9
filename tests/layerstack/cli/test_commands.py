import hashlib
import io
import json
import signal
import subprocess

import psutil
import pytest
from safetensors.numpy import load_file

import layerstack
from jobs.settings import load_settings
from tests.support import layerstack_command, wait_for


def test_predict_shows_shapes_and_writes_safetensors(run, tmp_path):
    code, out, _ = run("predict", "a fox", "a hen", "-o", tmp_path / "x.safetensors", "--json")
    assert code == 0
    assert json.loads(out)["prompt_embeds"] == [2, 512, 96]
    tensors = load_file(tmp_path / "x.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "prompt_embeds": (2, 512, 96),
        "text_ids": (2, 512, 4),
    }


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a fox\na hen\n")
    return path


def test_a_job_is_submitted_watched_shown_listed_and_fetched(run, tmp_path, prompts):
    code, out, err = run("jobs", "submit", prompts, "--layout", "dense", "--metadata", "set=birds")
    job_id = out.strip()
    assert (code, len(job_id)) == (0, 26)
    assert f"2 prompts in 1 part; next: `layerstack jobs watch {job_id}`" in err
    code, _, err = run("jobs", "watch", job_id)
    assert code == 0
    assert "succeeded: 2 of 2 prompts, 1 of 1 parts" in err
    assert f"next: `layerstack jobs fetch {job_id} -o FOLDER`" in err
    shown = run("jobs", "show", job_id)[1]
    for text in (job_id, "succeeded", "2 of 2 (100 %)", "1 of 1", "0 failed, 0 truncated", "dense, float32", "birds"):
        assert text in shown
    assert job_id in run("jobs", "list")[1]
    assert json.loads(run("jobs", "list", "--limit", "1", "--json")[1])[0]["id"] == job_id
    code, out, err = run("jobs", "fetch", job_id, "-o", tmp_path / "got")
    assert (code, out.strip()) == (0, str(tmp_path / "got"))
    assert "2 rows in 1 part, 0 of them failed" in err
    assert len(layerstack.read(tmp_path / "got")) == 2


def test_the_newest_job_is_meant_where_none_is_named(run, tmp_path, prompts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job_id = json.loads(run("jobs", "submit", prompts, "--json")[1])["id"]
    assert run("jobs", "watch")[0] == 0
    assert json.loads(run("jobs", "show", "--json")[1])["id"] == job_id
    assert json.loads(run("jobs", "fetch", "--json")[1])["folder"] == job_id
    assert len(layerstack.read(job_id)) == 2


def test_submitting_may_watch_until_the_end(run, prompts):
    code, out, err = run("jobs", "submit", prompts, "--watch")
    assert (code, len(out.strip())) == (0, 26)
    assert "succeeded: 2 of 2 prompts" in err


def test_lines_of_standard_input_are_prompts_too(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a fox\r\n\na hen"))
    assert json.loads(run("jobs", "submit", "-", "--json")[1])["num_prompts"] == 3


def test_watching_as_json_prints_an_event_a_line(run, prompts):
    job_id = run("jobs", "submit", prompts)[1].strip()
    code, out, _ = run("jobs", "watch", job_id, "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert (code, events[-1]["event"], events[-1]["data"]["status"]) == (0, "end", "succeeded")
    assert [event["data"]["index"] for event in events if event["event"] == "part"] == [0]


def test_text_of_others_is_shown_as_it_is(run, tmp_path, prompts):
    job_id = run("jobs", "submit", prompts, "--metadata", "[/x]=[red]1")[1].strip()
    assert run("jobs", "watch", job_id)[0] == 0
    shown = run("jobs", "show", job_id)[1]
    assert "[/x]" in shown
    assert "[red]1" in shown
    folder = tmp_path / "got[a]"
    assert run("jobs", "fetch", job_id, "-o", folder)[1] == f"{folder}\n"


def test_submitting_and_watching_as_json_prints_an_event_a_line(run, prompts):
    code, out, _ = run("jobs", "submit", prompts, "--watch", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert (code, events[0]["event"], events[-1]["event"]) == (0, "submitted", "end")


def test_ctrl_c_ends_the_reading_of_a_quiet_pipe(stack):
    command = [layerstack_command(), "jobs", "submit", "-", "--url", stack.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        connections = psutil.Process(process.pid)
        wait_for(connections.net_connections, process)  # to the server, whose answer it waits for
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert "Traceback" not in process.stderr.read()


def test_a_job_is_cancelled_retried_and_deleted(run, tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("".join(f"prompt number {n}\n" for n in range(3000)))
    job_id = run("jobs", "submit", path, "--chunk-rows", 100)[1].strip()
    assert run("jobs", "cancel", job_id)[1].strip() in {"cancelling", "cancelled"}
    code, _, err = run("jobs", "watch", job_id)
    assert code == 4
    assert f"job {job_id} is cancelled" in err
    assert f"`layerstack jobs retry {job_id}` does the rest" in err
    assert [job["id"] for job in json.loads(run("jobs", "list", "--status", "cancelled", "--json")[1])] == [job_id]
    assert json.loads(run("jobs", "retry", job_id, "--json")[1])["status"] in {"queued", "running"}
    assert run("jobs", "delete", job_id, "--json")[:2] == (
        0,
        json.dumps({"id": job_id, "deleted": True}, indent=2) + "\n",
    )
    assert run("jobs", "watch", job_id)[0] == 1


def test_ctrl_c_ends_the_watching_with_130_and_not_the_job(stack, tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("".join(f"prompt number {n}\n" for n in range(3000)))
    command = [layerstack_command(), "jobs", "submit", str(path), "--watch", "--url", stack.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        job_id = process.stdout.readline().strip()
        for line in process.stderr:
            if line.startswith(("queued:", "running:")):
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert "Traceback" not in process.stderr.read()
    with layerstack.Client(stack.url) as client:
        job = client.jobs.get(job_id)
        assert not job.status.is_final
        job.delete()


def test_bench_tells_how_fast_a_server_answers(run, prompts):
    code, out, _ = run("bench", "--prompts", prompts, "--requests", "3", "--batch", "5", "--json")
    measured = json.loads(out)
    assert (code, measured["requests"], measured["batch"]) == (0, 3, 5)
    assert 0 < measured["median_ms"] <= measured["p95_ms"]
    assert min(measured["prompts_per_s"], measured["rows_per_s"]) > 0


def test_without_a_server_it_says_what_to_do(run):
    code, out, err = run("jobs", "list", url="http://127.0.0.1:9")
    assert (code, out) == (3, "")
    assert "http://127.0.0.1:9" in err
    assert "layerstack up" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["jobs", "show", "nonsense"], "no job 'nonsense'; `layerstack jobs list` shows those that there are"),
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
    assert run("jobs", "submit", "p.txt", "--metadata", "birds")[0] == 2
    assert run("bench", "--prompts", "/dev/null")[0] == 2
    assert run("nonsense")[0] == 2
    assert run("predict", "a", "-o", "/nowhere/x.safetensors")[0] == 2
    assert run("jobs", "list", url="localhost:7860")[0] == 2


def test_the_version_is_printed(run):
    assert run("version")[1].strip() == layerstack.__version__
