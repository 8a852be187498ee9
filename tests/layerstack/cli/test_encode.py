import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import layerstack
from layerstack import cli
from tests.support import clean_environment, layerstack_command, wait_for

TEXTS = [f"prompt number {n}" for n in range(400)]


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS))
    return path


@pytest.fixture
def encode(capsys, monkeypatch, tiny, tmp_path):
    """Run `layerstack encode` on the checkpoint of the tests; returns exit code, standard output and standard error."""
    monkeypatch.setenv("LAYERSTACK_MODEL", str(tiny))
    monkeypatch.setenv("LAYERSTACK_LOCAL_DIR", str(tmp_path / "local"))

    def call(*words):
        monkeypatch.setattr("sys.argv", ["layerstack", "encode", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


def command(tiny, prompt_file, out):
    words = [layerstack_command(), "encode", prompt_file, "-o", out, "--model", tiny, "--chunk-rows", "20"]
    return [*map(str, words), "--device", "cpu", "--json"]


def traces(out):
    """What would tell that a part that counts has been written anew."""
    found = {}
    for report in (out / "parts").glob("*.json"):
        for path in (report, report.with_suffix(".parquet")):
            found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def test_results_are_where_it_says_and_as_it_says(encode, encoder, prompt_file, tmp_path):
    prompt_file.write_text("a fox\na hen\n")
    code, out, err = encode(prompt_file, "-o", tmp_path / "out")
    assert (code, out) == (0, f"{tmp_path / 'out'}\n")
    assert "encoding 2 prompts" in err
    assert f"fingerprint {encoder.fingerprint}" in err
    assert err.endswith(f"layerstack.read('{tmp_path / 'out'}') opens them\n")
    want, _ = encoder.dense(encoder.encode(["a fox", "a hen"]))
    rows = layerstack.read(tmp_path / "out")
    for row, dense in zip(rows, want, strict=True):
        np.testing.assert_allclose(row["prompt_embeds"], dense, rtol=1e-4, atol=1e-4)


def test_a_second_time_it_says_that_all_is_there(encode, prompt_file, tmp_path):
    words = (prompt_file, "-o", tmp_path / "out", "--dtype", "bfloat16", "--json")
    first, again = encode(*words), encode(*words)
    assert (first[0], again[0]) == (0, 0)
    assert "all of it was there already" in again[2]
    assert "loading" not in again[2]
    told = json.loads(again[1])
    assert told == json.loads(first[1]) | {"parts_written": 0}
    assert {name: told[name] for name in ("folder", "rows", "failed")} == {
        "folder": str(tmp_path / "out"),
        "rows": 400,
        "failed": 0,
    }


def test_with_check_a_damaged_part_is_found_and_done_anew(encode, prompt_file, tmp_path):
    prompt_file.write_text("a fox\na hen\n")
    words = (prompt_file, "-o", tmp_path / "out", "--chunk-rows", 1)
    encode(*words)
    good = encode(*words, "--check")
    assert good[0] == 0
    assert "all of it was there already, and each part is what the manifest says" in good[2]
    part = tmp_path / "out" / "parts" / "00001.parquet"
    content = bytearray(part.read_bytes())
    content[100] ^= 1
    part.write_bytes(content)
    code, _, err = encode(*words, "--check")
    assert code == 0
    assert "2 rows in 2 parts (1 of them done now)" in err
    assert layerstack.read(tmp_path / "out").verify() is None


def test_the_choices_of_an_option_are_completed():
    asked = clean_environment() | {
        "_LAYERSTACK_COMPLETE": "complete_bash",
        "COMP_WORDS": "layerstack encode --encoder-dtype f",
        "COMP_CWORD": "3",
    }
    told = subprocess.run([layerstack_command()], check=False, capture_output=True, text=True, env=asked)
    assert told.stdout.split() == ["float16", "float32"]


def test_killed_three_times_it_ends_with_all_rows_and_does_no_finished_part_anew(encoder, tiny, prompt_file, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    for _ in range(3):
        before = traces(out)
        awaited = len(before) + 4  # two parts more
        with (
            log.open("wb") as output,
            subprocess.Popen(
                command(tiny, prompt_file, out), stdout=output, stderr=output, env=clean_environment()
            ) as process,
        ):
            wait_for(lambda awaited=awaited: len(traces(out)) >= awaited, process, log)
            process.kill()
        assert before.items() <= traces(out).items()
    before = traces(out)
    assert len(before) < 2 * 20
    ended = subprocess.run(
        command(tiny, prompt_file, out), check=False, capture_output=True, text=True, env=clean_environment()
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert (told["rows"], told["succeeded"], told["parts"]) == (400, 400, 20)
    assert told["parts_written"] == 20 - len(before) // 2
    assert before.items() <= traces(out).items()
    assert not list(out.rglob("*.tmp"))
    rows = layerstack.read(out)
    assert [rows[n]["prompt"] for n in range(len(rows))] == TEXTS
    want, _ = encoder.dense(encoder.encode(TEXTS[::40]))
    for n, dense in zip(range(0, 400, 40), want, strict=True):
        np.testing.assert_allclose(rows[n]["prompt_embeds"], dense, rtol=1e-4, atol=1e-4)


def test_ctrl_c_ends_it_in_order_and_says_that_the_same_command_goes_on(tiny, prompt_file, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command(tiny, prompt_file, out), stdout=output, stderr=output, env=clean_environment()
        ) as process,
    ):
        wait_for(lambda: traces(out), process, log)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert log.read_text().endswith("stopped; the same command goes on from here\n")
    assert not list(out.rglob("*.tmp"))


def test_without_a_model_it_is_the_demo_encoder_and_says_so(encode, prompt_file, tmp_path, monkeypatch):
    monkeypatch.delenv("LAYERSTACK_MODEL")
    prompt_file.write_text("a fox\n")
    code, _, err = encode(prompt_file, "-o", tmp_path / "out")
    assert code == 0
    assert "this is the demo encoder: its weights are RANDOM" in err
    assert (tmp_path / "local" / "demo-encoder-mistral3").is_dir()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["/nowhere/prompts.txt", "-o", "{}/out"], 1, "/nowhere/prompts.txt: No such file"),
        ([__file__, "-o", "{}/out"], 1, "test_encode.py: not a prompt file, by its name"),
        (["{}/prompts.txt", "-o", "{}"], 1, "has other files in it (prompts.txt); choose another -o"),
        (["{}/prompts.txt", "-o", "/proc/nope"], 1, "/proc/nope"),
        (["{}/prompts.txt", "-o", "{}/out", "--model", "/nowhere"], 1, "/nowhere: no such folder"),
        (["{}/prompts.txt", "-o", "{}/out", "--attention", "x"], 2, "'x' is not one of 'auto', 'varlen', 'sdpa'"),
        (["{}/prompts.txt", "-o", "{}/out", "--encoder-dtype", "int8"], 2, "'int8' is not one of 'bfloat16'"),
        (["{}/prompts.txt", "-o", "{}/out", "--preset", "flux9"], 2, "'flux9' is not one of 'flux2-dev'"),
        (["{}/prompts.txt", "-o", "{}/out", "--dtype", "int8"], 2, "'int8' is not one of 'bfloat16'"),
        (["{}/prompts.txt", "-o", "{}/out", "--layout", "x"], 2, "'x' is not one of 'own_rows', 'dense'"),
        (["{}/prompts.txt", "-o", "{}/out", "--chunk-rows", "0"], 2, "--chunk-rows"),
        (["{}/prompts.txt"], 2, "--output"),
    ],
)
def test_what_is_in_the_way_is_one_line(encode, prompt_file, words, code, message):
    ended, out, err = encode(*(word.format(prompt_file.parent) for word in words))
    assert (ended, out) == (code, "")
    assert message in " ".join(err.replace("│", " ").split())  # typer draws a box around its own
    assert "Traceback" not in err
    if code == 1:
        assert err.splitlines()[-1].startswith("error: ")


def test_neither_the_package_nor_its_help_imports_torch():
    code = "import sys, layerstack.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ).returncode == 0
