import builtins
import pickle
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

import layerstack
from jobs import parts
from jobs.layout import job_names
from jobs.parts import EncodedRow, PartHeader, PartWriter
from jobs.results import finalise
from jobs.storage import open_storage
from jobs.store import JobStore
from jobs.tensors import DTYPES
from layerstack.errors import LayerstackError, OptionError, ReadError, RowFailedError, RowNotFoundError
from tests.sample_jobs import do_chunk, make_job

D, P, LENGTH = 4, 2, 8
PREFIX = np.arange(P * D, dtype=np.float32).reshape(P, D)
PAD = np.full(D, -1, np.float32)


def own_rows(index):
    return np.full((1 + index % 5, D), index, np.float32)


@pytest.fixture
def write_parts(tmp_path):
    """Write a `parts/` folder with rows 0 to `count`, and return it."""

    def write(count=10, rows_per_part=4, bad=(), fingerprints=None, ids=None, compression="none", **options):
        folder = tmp_path / "job" / "parts"
        folder.mkdir(parents=True)
        for number, start in enumerate(range(0, count, rows_per_part)):
            header = PartHeader.build(
                **{"layout": "own_rows", "dtype": "float32"} | options,
                max_length=LENGTH, layers=(1,), prefix_rows=PREFIX, pad_row=PAD,
                fingerprint=fingerprints[number] if fingerprints else "f",
            )  # fmt: skip
            with (folder / f"{number:05d}.parquet").open("wb") as file, PartWriter(file, header, compression) as part:
                for index in range(start, min(start + rows_per_part, count)):
                    name = ids[index] if ids else f"id{index}"
                    if index in bad:
                        part.write(EncodedRow(index, name, "p", error="why"))
                    else:
                        own = own_rows(index)
                        part.write(EncodedRow(index, name, f"p{index}", own, len(own) + P, truncated=False))
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
def finished_job(tmp_path):
    """Make a finished job, and return its folder as it looks when it has been fetched."""

    def make(count=10, bad=(), **options):
        store = JobStore(open_storage(str(tmp_path / "storage")))
        record = make_job(store, count, **options)
        for chunk in range(record.num_chunks):
            do_chunk(store, record, chunk, bad)
        assert finalise(store, record.id, read_all=True) == []
        folder, fetched = Path(store.storage.local_path(job_names(record.id).folder)), tmp_path / "fetched"
        shutil.copytree(folder / "parts", fetched / "parts", ignore=shutil.ignore_patterns("*.json"))
        shutil.copy(folder / "manifest.json", fetched)
        return fetched

    return make


@pytest.fixture
def fetched(finished_job):
    """A finished job of three parts."""
    return finished_job(3, chunk_rows=1)


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


def indices(rows):
    return [row["index"] for row in rows]


@pytest.mark.parametrize("stored", ["own_rows", "dense"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_own_rows_are_cut_out_of_either_layout(write_parts, stored, dtype):
    rows = layerstack.read(write_parts(layout=stored, dtype=dtype), layout="own_rows")
    for index in range(10):
        np.testing.assert_array_equal(rows[index]["prompt_embeds"].float(), own_rows(index))
        n = len(own_rows(index))
        assert rows[index]["text_ids"].tolist() == [[0, 0, 0, place] for place in range(LENGTH - n, LENGTH)]


def test_own_rows_with_padding_at_the_right_are_all_behind_the_prefix(tmp_path):
    own = np.arange(1, (LENGTH - P) * D + 1, dtype=np.float32).reshape(LENGTH - P, D)
    found = []
    for layout in ("own_rows", "dense"):
        header = PartHeader.build(
            layout=layout, dtype="float32", max_length=LENGTH, layers=(1,), fingerprint="f",
            prefix_rows=PREFIX, pad_row=np.zeros(D, np.float32),
        )  # fmt: skip
        path = tmp_path / f"{layout}.parquet"
        with path.open("wb") as file, PartWriter(file, header, "none") as part:
            part.write(EncodedRow(0, "a", "a", own, P + 3, truncated=False))
        found.append(layerstack.read(path, layout="own_rows")[0])
    for row in found:
        np.testing.assert_array_equal(row["prompt_embeds"], own)
        assert row["text_ids"][:, 3].tolist() == list(range(P, LENGTH))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_arrays_come_without_torch(write_parts, monkeypatch, dtype):
    folder = write_parts(dtype=dtype)

    def without_torch(name, *rest, **named):
        if name == "torch":
            raise ImportError(name)
        return imported(name, *rest, **named)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without_torch)
    row = layerstack.read(folder, tensors="numpy")[7]
    assert row["prompt_embeds"].dtype == DTYPES[dtype]
    np.testing.assert_array_equal(row["prompt_embeds"].astype(np.float32), dense(7))
    assert row["text_ids"].shape == (LENGTH, 4)
    with pytest.raises(OptionError, match=r"needs the package torch: pip install torch, or read with tensors='numpy'"):
        layerstack.read(folder)[7]


@pytest.mark.parametrize("tensors", ["torch", "numpy"])
@pytest.mark.parametrize("layout", ["own_rows", "dense"])
def test_a_tensor_may_be_written_to_and_no_other_changes(write_parts, tensors, layout):
    rows = layerstack.read(write_parts(), tensors=tensors, layout=layout)
    for name in ("prompt_embeds", "text_ids"):
        changed, before = rows[3][name], np.array(rows[3][name].tolist())
        changed[:] = 77
        np.testing.assert_array_equal(rows[3][name], before)
        assert not (np.asarray(rows[4][name]) == 77).any()


@pytest.mark.parametrize("option", ["layout", "tensors", "skip_failed"])
def test_an_option_with_another_value_is_named_with_what_is_allowed(write_parts, option):
    with pytest.raises(OptionError, match=rf"{option}='jax': it has to be .* or "):
        layerstack.read(write_parts(), **{option: "jax"})


def test_a_slice_is_a_view_that_can_be_sliced_again(write_parts, monkeypatch):
    rows = layerstack.read(write_parts())
    with monkeypatch.context() as patch:
        patch.setattr(parts, "PART_SCHEMA", None)
        view = rows[2:9]
    assert (type(view), len(view), view.fingerprint) == (type(rows), 7, "f")
    assert indices(view) == list(range(2, 9))
    assert indices(view[::-3]) == [8, 5, 2]
    assert view[-1]["index"] == 8
    assert indices(rows[20:]) == []
    with pytest.raises(IndexError, match="row 7 of 7"):
        view[7]


@pytest.mark.parametrize("chosen", [[3, -1, 3], np.array([3, -1, 3]), torch.tensor([3, -1, 3]), (3, 9, 3)])
def test_a_list_of_positions_is_a_view(write_parts, chosen):
    view = layerstack.read(write_parts())[chosen]
    assert indices(view) == [3, 9, 3]
    assert indices(view[1:]) == [9, 3]


def test_a_bool_a_row_chooses_rows(write_parts):
    rows = layerstack.read(write_parts())
    assert indices(rows[np.arange(10) % 4 == 1]) == [1, 5, 9]
    with pytest.raises(IndexError, match="2 bools for 10 rows"):
        rows[[True, False]]


def test_positions_that_are_none_are_refused(write_parts):
    rows = layerstack.read(write_parts())
    assert len(rows[[]]) == 0
    with pytest.raises(IndexError, match="row 10 of 10"):
        rows[[0, 10]]
    for wrong in (1.5, "1", [[1]], ["a"]):
        with pytest.raises(TypeError, match="rows are chosen by integers"):
            rows[wrong]


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, torch.tensor])
def test_integers_of_other_libraries_are_positions(write_parts, kind):
    assert layerstack.read(write_parts())[kind(7)]["index"] == 7


def test_rows_are_found_by_id_and_by_index(write_parts):
    rows = layerstack.read(write_parts())
    assert rows.by_id("id7")["prompt"] == "p7"
    assert rows.by_index(7)["id"] == "id7"
    for found in (rows.by_id, rows.by_index):
        with pytest.raises(RowNotFoundError, match=r"^no row with the i.* among <10 rows of .*fingerprint f>$"):
            found({rows.by_id: "id10", rows.by_index: 10}[found])
    with pytest.raises(KeyError):
        rows.by_index(-1)


def test_rows_of_a_view_are_found_in_it_alone(write_parts):
    rows = layerstack.read(write_parts())
    for view in (rows[4:8], rows[[7, 5]]):
        assert view.by_id("id5")["index"] == view.by_index(5)["index"] == 5
        assert [view[position]["id"] for position in view.positions_of("id7")] == ["id7"]
        for missing in (lambda view=view: view.by_id("id9"), lambda view=view: view.by_index(9)):
            with pytest.raises(RowNotFoundError):
                missing()


def test_an_id_that_several_rows_have_is_an_error_that_says_how_to_get_them(write_parts):
    rows = layerstack.read(write_parts(ids=list("abcabcabca")))
    assert rows.positions_of("a") == [0, 3, 6, 9]
    with pytest.raises(RowNotFoundError, match=r"4 rows have the id 'a': \.positions_of\('a'\)"):
        rows.by_id("a")
    assert rows[1:3].by_id("c")["index"] == 2


def test_an_index_is_that_of_the_job_also_in_a_part_of_it(finished_job):
    folder = finished_job()
    part = layerstack.read(folder / "parts" / "00001.parquet")
    assert part.by_index(5)["id"] == part[1]["id"] == "id5"
    with pytest.raises(RowNotFoundError):
        part.by_index(1)
    (folder / "parts" / "00001.parquet").unlink()
    rows = layerstack.read(folder / "parts")
    assert [rows.by_index(index)["index"] for index in (3, 8)] == [3, 8]
    with pytest.raises(RowNotFoundError):
        rows.by_index(4)


def test_rows_that_failed_can_be_left_out(finished_job, write_parts):
    for folder in (finished_job(bad={1, 5}), write_parts(bad={1, 5})):
        rows = layerstack.read(folder, skip_failed=True)
        assert indices(rows) == [0, 2, 3, 4, 6, 7, 8, 9]
        assert rows[1]["index"] == rows.by_index(2)["index"] == rows.by_id("id2")["index"] == 2
        with pytest.raises(RowNotFoundError):
            rows.by_id("id5")


def test_a_part_is_looked_into_when_it_is_needed(finished_job):
    folder = finished_job(bad={1})
    for name in ("00001", "00002"):  # of the right size, but nothing else is right
        path = folder / "parts" / f"{name}.parquet"
        path.write_bytes(b"x" * path.stat().st_size)
    rows = layerstack.read(folder, skip_failed=True)
    assert indices(rows[:3]) == [0, 2, 3]
    with pytest.raises(ReadError, match=r"00001\.parquet is damaged"):
        rows[4]
    assert rows[0]["index"] == 0


@pytest.mark.parametrize("replaced", [0, 1])
def test_a_part_of_another_encoder_is_refused_when_it_is_needed(finished_job, replaced):
    folder = finished_job(chunk_rows=5)
    path = folder / "parts" / f"0000{replaced}.parquet"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"0123456789abcdef", b"fedcba9876543210"))
    with pytest.raises(ReadError, match=rf"0000{replaced}\.parquet .*do not belong together"):
        layerstack.read(folder)[5]


def test_a_part_with_other_rows_than_the_manifest_says_is_refused(finished_job):
    folder = finished_job(chunk_rows=5)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"rows": 5', '"rows": 4'))
    with pytest.raises(ReadError, match=r"00000\.parquet has 5 rows, and 4 by the manifest"):
        layerstack.read(folder)


def test_parts_that_are_what_the_manifest_says_are_verified(finished_job):
    told = []
    layerstack.read(finished_job())[2:4].verify(on_part=told.append)
    assert [part.index for part in told] == [0, 1, 2]


def test_a_flipped_bit_is_found_and_its_part_named(finished_job):
    folder = finished_job()
    for name in ("00001", "00002"):
        path = folder / "parts" / f"{name}.parquet"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(
        ReadError, match=r"/00001\.parquet, .*/00002\.parquet: damaged, the SHA-256 is not the manifest's"
    ):
        layerstack.read(folder).verify()


def test_nothing_can_be_verified_without_a_manifest(write_parts):
    with pytest.raises(ReadError, match="has no manifest to compare with: open the job's folder"):
        layerstack.read(write_parts()).verify()


@pytest.mark.parametrize("tensors", ["torch", "numpy"])
@pytest.mark.parametrize("layout", ["own_rows", "dense"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_stacked_into_one_batch(write_parts, tensors, layout, dtype):
    rows = layerstack.read(write_parts(layout=layout, dtype=dtype), tensors=tensors)
    batch = rows[[7, 0, 9]].stack()
    wanted = np.stack([dense(7), dense(0), dense(9)])
    np.testing.assert_array_equal(np.asarray(batch["prompt_embeds"].tolist()), wanted)
    assert tuple(batch["text_ids"].shape) == (3, LENGTH, 4)
    assert batch["index"].tolist() == [7, 0, 9]
    assert batch["num_tokens"].tolist() == [5, 3, 7]
    assert batch["truncated"].tolist() == [False] * 3
    assert (batch["id"], batch["prompt"]) == (["id7", "id0", "id9"], ["p7", "p0", "p9"])
    out = batch["prompt_embeds"]
    again = rows[:3].stack(out=out)
    assert again["prompt_embeds"] is out
    np.testing.assert_array_equal(np.asarray(out.tolist()), np.stack([dense(n) for n in range(3)]))


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(2, LENGTH, D),
        torch.zeros(3, LENGTH, D, dtype=torch.bfloat16),
        torch.zeros(3, LENGTH, D, device="meta"),
        torch.zeros(3, D, LENGTH).mT,
        np.zeros((3, LENGTH, D)),
        np.zeros((3, LENGTH, D), ml_dtypes.bfloat16),
        np.zeros((3, D, LENGTH), np.float32).swapaxes(1, 2),
        [0.0],
    ],
)
def test_a_batch_of_another_shape_dtype_or_place_is_refused(write_parts, out):
    with pytest.raises(OptionError, match=r"^out.*: it has to be "):
        layerstack.read(write_parts())[:3].stack(out=out)


def test_own_rows_cannot_be_stacked(write_parts):
    with pytest.raises(OptionError, match=r"own rows differ in number .* layout='dense'"):
        layerstack.read(write_parts(), layout="own_rows").stack()


@pytest.mark.parametrize("context", [None, "fork", "spawn"])
def test_a_data_loader_reads_whole_batches(write_parts, context):
    rows = layerstack.read(write_parts())
    rows[0]
    loader = DataLoader(
        rows, batch_size=None, sampler=BatchSampler(SequentialSampler(rows), 4, drop_last=False),
        collate_fn=layerstack.PromptEmbeddings.stack, num_workers=2 if context else 0, multiprocessing_context=context,
    )  # fmt: skip
    batches = list(loader)
    assert [len(batch["id"]) for batch in batches] == [4, 4, 2]
    got = torch.cat([batch["prompt_embeds"] for batch in batches])
    np.testing.assert_array_equal(got, np.stack([dense(index) for index in range(10)]))


def test_a_view_can_be_pickled(write_parts):
    rows = layerstack.read(write_parts(), tensors="numpy")[[5, 2]]
    rows.by_id("id2")
    again = pickle.loads(pickle.dumps(rows))  # noqa: S301 - our own bytes
    assert indices(again) == [5, 2]
    assert isinstance(again[0]["prompt_embeds"], np.ndarray)
    assert again.by_id("id2")["index"] == 2


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("group_bytes", [1, 200, 2**20])
def test_values_are_found_wherever_they_lie(write_parts, monkeypatch, compression, group_bytes):
    monkeypatch.setattr(parts, "ROW_GROUP_BYTES", group_bytes)
    rows = layerstack.read(write_parts(count=300, rows_per_part=150, bad={3, 149, 299}, compression=compression))
    for index in np.random.default_rng(0).permutation(300):
        if index in {3, 149, 299}:
            with pytest.raises(RowFailedError):
                rows[index]
        else:
            np.testing.assert_array_equal(rows[index]["prompt_embeds"], dense(int(index)))


def test_errors_of_the_reader_are_of_layerstack():
    for kind in (OptionError, ReadError, RowNotFoundError, RowFailedError):
        assert issubclass(kind, LayerstackError)
