import pickle

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader

import layerstack
from jobs import parts
from jobs.parts import EncodedRow, PartHeader, PartWriter
from jobs.records import JobStatus
from jobs.tensors import DTYPES
from layerstack.errors import ReadError, RowFailedError
from tests.support import wait_for

D, P, LENGTH = 4, 2, 8
PREFIX = np.arange(P * D, dtype=np.float32).reshape(P, D)
PAD = np.full(D, -1, np.float32)


def own_rows(index):
    return np.full((1 + index % 5, D), index, np.float32)


@pytest.fixture
def write_parts(tmp_path):
    """Write a `parts/` folder with rows 0 to `count`, and return it."""

    def write(count=10, rows_per_part=4, bad=(), fingerprints=None, **options):
        folder = tmp_path / "job" / "parts"
        folder.mkdir(parents=True)
        for number, start in enumerate(range(0, count, rows_per_part)):
            header = PartHeader.build(
                **{"layout": "own_rows", "dtype": "float32"} | options,
                max_length=LENGTH, layers=(1,), prefix_rows=PREFIX, pad_row=PAD,
                fingerprint=fingerprints[number] if fingerprints else "f",
            )  # fmt: skip
            with (folder / f"{number:05d}.parquet").open("wb") as file, PartWriter(file, header, "none") as part:
                for index in range(start, min(start + rows_per_part, count)):
                    if index in bad:
                        part.write(EncodedRow(index, f"id{index}", "p", error="why"))
                    else:
                        own = own_rows(index)
                        part.write(EncodedRow(index, f"id{index}", f"p{index}", own, len(own) + P, truncated=False))
        return folder

    return write


def dense(index):
    own = own_rows(index)
    pads = np.repeat(PAD[None], LENGTH - P - len(own), axis=0)
    return np.concatenate([pads, PREFIX, own])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["own_rows", "dense"])
def test_rows_are_dense_tensors_with_what_belongs_to_them(write_parts, dtype, layout):
    rows = layerstack.read(write_parts(dtype=dtype, layout=layout))
    assert len(rows) == 10
    row = rows[7]
    assert set(row) == {"prompt_embeds", "text_ids", "index", "id", "prompt", "num_tokens", "truncated"}
    assert row["prompt_embeds"].dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(row["prompt_embeds"].float(), dense(7))
    assert row["text_ids"].dtype == torch.int64
    assert row["text_ids"].tolist() == [[0, 0, 0, position] for position in range(LENGTH)]
    assert (row["index"], row["id"], row["prompt"]) == (7, "id7", "p7")
    assert (row["num_tokens"], row["truncated"]) == (5, False)


def test_all_rows_come_in_input_order_whatever_the_row_groups(write_parts, monkeypatch):
    monkeypatch.setattr(parts, "ROW_GROUP_BYTES", 40)
    rows = layerstack.read(write_parts())
    assert [row["index"] for row in rows] == list(range(10))
    for index in np.random.default_rng(0).permutation(10):
        np.testing.assert_array_equal(rows[int(index)]["prompt_embeds"], dense(index))
    np.testing.assert_array_equal(rows[-1]["prompt_embeds"], dense(9))


@pytest.mark.parametrize("position", [10, -11])
def test_a_row_that_is_not_there_is_an_index_error(write_parts, position):
    rows = layerstack.read(write_parts())
    with pytest.raises(IndexError, match=f"row {position} of 10"):
        rows[position]


def test_one_part_can_be_read_too(write_parts):
    folder = write_parts()
    assert [row["index"] for row in layerstack.read(str(folder / "00001.parquet"))] == [4, 5, 6, 7]


def test_a_folder_without_manifest_is_a_download_that_is_not_complete(write_parts):
    folder = write_parts()
    with pytest.raises(ReadError, match=r"download is not complete.*`layerstack jobs fetch` again.*open .*/parts"):
        layerstack.read(folder.parent)
    assert len(layerstack.read(folder)) == 10


def test_more_parts_than_files_may_be_open_can_be_read(write_parts):
    folder = write_parts(count=60, rows_per_part=1)
    before = psutil.Process().num_fds()
    rows = layerstack.read(folder)
    assert [rows[n]["index"] for n in range(60)] == list(range(60))
    assert psutil.Process().num_fds() - before < 30


def test_parts_are_ordered_by_number_not_by_name(write_parts):
    folder = write_parts()
    (folder / "00002.parquet").rename(folder / "100000.parquet")
    (folder / "00001.parquet").rename(folder / "99999.parquet")
    assert [row["index"] for row in layerstack.read(folder)] == list(range(10))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_data_loader_reads_them(write_parts, num_workers, context):
    rows = layerstack.read(write_parts())
    rows[0]  # opens a file, which a worker must not share
    loader = DataLoader(
        rows, batch_size=5, num_workers=num_workers, multiprocessing_context=context if num_workers else None
    )
    batches = list(loader)
    assert [batch["prompt_embeds"].shape for batch in batches] == [(5, LENGTH, D)] * 2
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(10))


def test_it_can_be_pickled(write_parts):
    rows = pickle.loads(pickle.dumps(layerstack.read(write_parts())))  # noqa: S301 - our own bytes
    np.testing.assert_array_equal(rows[3]["prompt_embeds"], dense(3))


def test_a_row_that_failed_is_an_error_with_its_reason(write_parts):
    rows = layerstack.read(write_parts(bad={5}))
    assert rows[4]["index"] == 4
    with pytest.raises(RowFailedError, match="row 5 has no embedding: why"):
        rows[5]


def test_parts_of_different_encoders_are_not_mixed(write_parts):
    with pytest.raises(ReadError, match=r"00001\.parquet .* do not belong together.*\(fingerprints g and f\)"):
        layerstack.read(write_parts(fingerprints=["f", "g", "f"]))


def test_a_damaged_part_is_named(write_parts):
    folder = write_parts()
    (folder / "00001.parquet").write_bytes(b"rubbish")
    with pytest.raises(ReadError, match=r"00001\.parquet is damaged"):
        layerstack.read(folder)


@pytest.fixture
def fetched(stack, tmp_path):
    """A finished job of three parts, fetched."""
    with layerstack.Client(stack.url) as client:
        job = client.submit(["a", "b", "c"], {"chunk_rows": 1})
        wait_for(lambda: client.job(job.id).status == JobStatus.SUCCEEDED)
        client.fetch(job.id, tmp_path / "fetched")
    return tmp_path / "fetched"


def test_a_missing_part_of_a_job_is_named_with_what_can_still_be_read(fetched):
    (fetched / "parts" / "00001.parquet").unlink()
    with pytest.raises(ReadError, match=r"1 of 3 parts are missing, the first is 00001\.parquet.*open .*/parts"):
        layerstack.read(fetched)
    assert [row["index"] for row in layerstack.read(fetched / "parts")] == [0, 2]


def test_a_part_of_another_size_than_the_manifest_says_is_named(fetched):
    part = fetched / "parts" / "00001.parquet"
    size = part.stat().st_size
    part.write_bytes((fetched / "parts" / "00000.parquet").read_bytes() + b"x")
    with pytest.raises(ReadError, match=rf"00001\.parquet has \d+ bytes, and {size} by the manifest"):
        layerstack.read(fetched)


@pytest.mark.parametrize("content", [b"", b"rubbish", b"{}", b'{"version": 2}'])
@pytest.mark.parametrize("name", ["manifest.json", "job.json"])
def test_a_manifest_or_record_that_is_damaged_is_named(write_parts, name, content):
    folder = write_parts().parent
    (folder / name).write_bytes(content)
    with pytest.raises(ReadError, match=rf"{name} is damaged, or of another version of layerstack"):
        layerstack.read(folder)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.parquet"])
def test_a_path_that_does_not_exist_is_named(tmp_path, name):
    with pytest.raises(ReadError, match=f"{name}: no such file or folder"):
        layerstack.read(tmp_path / name)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ReadError, match="no parts"):
        layerstack.read(tmp_path)
