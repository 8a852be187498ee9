"""A training loop on the embeddings of a job."""

import re
from pathlib import Path

import pytest

import layerstack
from jobs.parts import EncodedRow, PartHeader, PartWriter

PROMPTS = Path(__file__).parents[2] / "examples" / "prompts.txt"
NUM_PROMPTS = 20


@pytest.fixture(scope="module")
def folder(stack, tmp_path_factory):
    """The downloaded results of a job over some of the example's prompts."""
    prompts = PROMPTS.read_text("utf-8").splitlines()[:NUM_PROMPTS]
    target = tmp_path_factory.mktemp("jobs") / "captions"
    with layerstack.Client(stack.url) as client:
        job = client.jobs.submit(prompts, {"dtype": "bfloat16"})
        job.wait(progress=False)
        job.download(target)
    return target


def losses(printed):
    found = re.search(r"^loss (\S+) at first, (\S+) at last$", printed, re.MULTILINE)
    return float(found[1]), float(found[2])


@pytest.mark.parametrize(("layout", "workers"), [("dense", 2), ("own_rows", 0), ("own_rows", 2)])
def test_the_loss_falls(folder, play, layout, workers):
    words = ["--layout", layout, "--workers", workers, "--batch-size", 5, "--steps", 200, "--device", "cpu"]
    ended = play("train_dataloader.py", folder, *words)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert ended.stdout.startswith(f"{NUM_PROMPTS} rows of fingerprint ")
    first, last = losses(ended.stdout)
    assert first > 1.8
    assert last < 1.2  # without the prompts, the mean of 1 / (t² + (1 - t)²), π / 2, is the least that there is
    lengths = {int(length) for length in re.findall(r"\(5, (\d+), 96\) torch.bfloat16", ended.stdout)}
    assert lengths == {512} if layout == "dense" else (len(lengths) > 1 and max(lengths) < 512)


def test_rows_that_failed_are_left_out(play, tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    header = PartHeader.build(
        layout="own_rows", dtype="bfloat16", max_length=16, layers=(1,), fingerprint="f",
        prefix_rows=np.ones((2, 8), np.float32), pad_row=np.zeros(8, np.float32),
    )  # fmt: skip
    with (tmp_path / "00000.parquet").open("wb") as file, PartWriter(file, header, "none") as part:
        for index in range(6):
            own = rng.standard_normal((3, 8), np.float32)
            part.write(
                EncodedRow(index, str(index), "p", error="why")
                if index == 2
                else EncodedRow(index, str(index), "p", own, 5, truncated=False)
            )
    ended = play("train_dataloader.py", tmp_path, "--workers", 0, "--steps", 4, "--device", "cpu")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("5 rows of fingerprint f, on cpu\n")


def test_a_folder_that_is_none_is_told_in_one_line(play):
    ended = play("train_dataloader.py", "nowhere")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "nowhere" in ended.stderr
    assert ended.stderr.count("\n") == 1
