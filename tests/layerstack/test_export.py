import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import layerstack
from jobs import parts as part_files
from jobs.errors import PartFormatError
from jobs.records import Manifest
from jobs.tensors import DTYPES
from layerstack.errors import ExportError, ReadError
from layerstack.export import export
from layerstack.exportoptions import ExportOptions
from layerstack.exportsurvey import needed_bytes, survey
from layerstack.scan import Parts
from layerstack.sources import open_source
from tests.layerstack.jobs_on_disk import PREFIX, D, L, dense, write_job
from tests.support import files_up_to


def exported(source, folder, to="safetensors", **options):
    return export(Parts(open_source(source)), folder, ExportOptions(to, **options))


def index_of(folder):
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def job(tmp_path):
    return write_job(tmp_path / "job", bad=(0, 5), cut=(4,))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", ["own_rows", "dense"])
@pytest.mark.parametrize("layout", ["own_rows", "dense"])
def test_safetensors_hold_the_same_tensors_as_the_reader_gives(tmp_path, out, dtype, stored, layout):
    job = write_job(tmp_path / "job", dtype=dtype, layout=stored)
    assert exported(job, out, layout=layout).written == 10
    for row in layerstack.read(job, layout=layout):
        tensors = load_file(out / f"{row['index']:08d}.safetensors")
        assert set(tensors) == {"prompt_embeds", "text_ids"}
        for name, tensor in tensors.items():
            assert tensor.dtype == row[name].dtype
            torch.testing.assert_close(tensor, row[name], rtol=0, atol=0)


def test_a_file_says_what_it_is_and_the_index_lists_all_rows(job, out):
    done = exported(job, out)
    assert (done.written, done.kept, done.failed, done.overflowed) == (8, 0, 2, 0)
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        f"{n:08d}.safetensors" for n in (1, 2, 3, 4, 6, 7, 8, 9)
    ]
    with safe_open(out / "00000004.safetensors", "pt") as file:
        assert file.metadata() == {
            "id": "id4", "index": "4", "prompt": "p4", "num_tokens": "7", "truncated": "true", "fingerprint": "f",
        }  # fmt: skip
    lines = index_of(out)
    assert [line["index"] for line in lines] == list(range(10))
    assert lines[0] == {"index": 0, "id": "id0", "prompt": "p0", "error": "why"}
    assert lines[4] == {
        "index": 4, "id": "id4", "prompt": "p4", "file": "00000004.safetensors", "num_tokens": 7, "truncated": True,
    }  # fmt: skip


@pytest.mark.parametrize("stored", ["own_rows", "dense"])
def test_dense_parquet_is_read_as_the_source_is_and_needs_nobody_to_know_us(tmp_path, out, stored):
    job = write_job(tmp_path / "job", bad=(0, 5), cut=(4,), layout=stored)
    assert exported(job, out, "dense-parquet").written == 8
    assert [path.name for path in sorted((out / "parts").glob("*.parquet"))] == [f"0000{n}.parquet" for n in range(3)]
    table = pq.read_table(out / "parts" / "00001.parquet")
    rows = np.frombuffer(table.column("prompt_embeds")[2].as_py(), np.float32).reshape(L, D)
    np.testing.assert_array_equal(rows, dense(6))
    assert table.column("text_ids")[2].as_py() == [[0, 0, 0, position] for position in range(L)]
    found, expected = layerstack.read(out, skip_failed=True), layerstack.read(job, skip_failed=True)
    assert (len(found), found.header.layout) == (8, "dense")
    for row, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(row.pop("prompt_embeds"), wanted.pop("prompt_embeds"), rtol=0, atol=0)
        assert {**row, "text_ids": None} == {**wanted, "text_ids": None}
    found.verify()
    manifest = Manifest.model_validate_json((out / "manifest.json").read_bytes())
    assert (manifest.rows, manifest.failed, manifest.truncated) == (10, 2, 1)
    assert [error.index for error in manifest.errors] == [0, 5]


def test_an_export_of_one_part_keeps_its_name(job, out):
    exported(job / "parts" / "00001.parquet", out, "dense-parquet")
    assert [row["index"] for row in layerstack.read(out, skip_failed=True)] == [4, 6, 7]
    assert (out / "parts" / "00001.parquet").is_file()


def test_compressed_parquet_has_the_same_rows(job, out):
    exported(job, out, "dense-parquet", compression="zstd")
    np.testing.assert_array_equal(layerstack.read(out)[6]["prompt_embeds"], dense(6))


@pytest.mark.parametrize("to", ["safetensors", "dense-parquet"])
def test_what_is_done_is_not_written_again(job, out, to):
    first = exported(job, out, to)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.suffix in {".safetensors", ".parquet"}}
    again = exported(job, out, to)
    assert (again.written, again.kept, again.failed) == (0, first.written, first.failed)
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.parametrize("to", ["safetensors", "dense-parquet"])
def test_an_export_that_was_interrupted_goes_on_and_ends_the_same(job, out, tmp_path, to):
    class StoppedError(Exception):
        pass

    def stop(_rows):
        nonlocal left
        left -= 1
        if not left:
            raise StoppedError

    left = 6
    with pytest.raises(StoppedError):
        export(Parts(open_source(job)), out, ExportOptions(to), stop)
    assert not (out / "index.jsonl").exists()
    assert not (out / "manifest.json").exists()
    done = exported(job, out, to)
    assert done.kept > 0
    assert done.kept + done.written == 8
    exported(job, tmp_path / "whole", to)
    found, whole = contents(out), contents(tmp_path / "whole")
    assert found.keys() == whole.keys()
    assert all(found[name] == whole[name] for name in whole if name.name != "manifest.json")  # it has a time in it


def test_a_file_that_somebody_has_shortened_is_written_anew(job, out):
    exported(job, out)
    path = out / "00000003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert exported(job, out).written == 1
    np.testing.assert_array_equal(load_file(path)["prompt_embeds"], dense(3))


def test_no_embedding_is_read_of_rows_that_are_done(job, out, monkeypatch):
    exported(job, out, layout="own_rows")
    monkeypatch.setattr("layerstack.scan.RowGroup.embeddings", property(lambda _: pytest.fail("read")))
    assert exported(job, out, layout="own_rows").kept == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layout": "own_rows"}, "layout is dense, not own_rows"),
        ({"dtype": "bfloat16"}, "dtype is float32, not bfloat16"),
        ({"name": "id"}, "name is index, not id"),
        ({"to": "dense-parquet"}, "to is safetensors, not dense-parquet"),
    ],
)
def test_a_folder_of_another_export_stays_as_it_is(job, out, options, said):
    exported(job, out)
    before = contents(out)
    with pytest.raises(ExportError, match=rf"holds another export \(.*{said}.*name another folder"):
        exported(job, out, **options)
    assert contents(out) == before


def test_so_does_one_of_other_rows_or_of_another_encoder(job, out, tmp_path):
    exported(job, out)
    with pytest.raises(ExportError, match="it has other rows"):
        exported(write_job(tmp_path / "b", ids={3: "another"}), out)
    with pytest.raises(ExportError, match="fingerprint is f, not g"):
        exported(write_job(tmp_path / "c", fingerprint="g"), out)


def test_a_folder_that_is_no_export_is_not_written_to(job, out):
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="not empty, and no export"):
        exported(job, out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_rows_are_the_same_however_they_are_cut_and_compressed(job, out, tmp_path, monkeypatch):
    exported(job, out)
    monkeypatch.setattr(part_files, "ROW_GROUP_BYTES", 50)
    cut = write_job(tmp_path / "b", rows_per_part=3, bad=(0, 5), cut=(4,))
    for path in (cut / "parts").glob("*.parquet"):  # as another writer of Parquet may store them
        metadata = pq.ParquetFile(path).metadata.metadata[b"layerstack"]
        table = pq.read_table(path)
        with pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=True) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({"layerstack": metadata})
    (cut / "manifest.json").unlink()
    assert exported(cut / "parts", out).kept == 8


def test_a_job_that_was_moved_is_still_the_same_source(job, out, tmp_path):
    exported(job, out)
    job.rename(tmp_path / "elsewhere")
    assert exported(tmp_path / "elsewhere", out).kept == 8


def test_files_can_be_called_after_ids(tmp_path, out):
    job = write_job(tmp_path / "job", count=3, ids={0: "a.b-C_9", 1: "x" * 128})
    exported(job, out, name="id")
    assert [line["file"] for line in index_of(out)] == [
        "a.b-C_9.safetensors", f"{'x' * 128}.safetensors", "id2.safetensors",
    ]  # fmt: skip
    np.testing.assert_array_equal(load_file(out / "a.b-C_9.safetensors")["prompt_embeds"], dense(0))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("", "is no name"), (".hidden", "is no name"), ("a/b", "is no name"), ("../x", "is no name"),
        ("a b", "is no name"), ("é", "is no name"), ("x" * 129, "is no name"), ("a\n", "is no name"),
        ("id3", "comes twice"), ("ID3", "comes twice"),
    ],
)  # fmt: skip
def test_an_id_that_is_no_file_name_is_named_with_the_rule_before_anything_is_written(tmp_path, out, bad, said):
    with pytest.raises(ExportError, match=said) as caught:
        exported(write_job(tmp_path / "job", ids={7: bad}), out, name="id")
    assert repr(bad) in str(caught.value)
    assert "A-Z a-z 0-9 . _ -" in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", ["safetensors", "dense-parquet"])
def test_values_can_be_converted(job, out, to, dtype):
    exported(job, out, to, dtype=dtype)
    if to == "safetensors":
        found = load_file(out / "00000004.safetensors")["prompt_embeds"]
    else:
        found = layerstack.read(out)[4]["prompt_embeds"]
    assert found.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(found.float(), dense(4))  # small integers, which every dtype holds


@pytest.mark.parametrize("to", ["safetensors", "dense-parquet"])
def test_values_that_a_dtype_cannot_hold_are_told_and_left_out_also_when_it_goes_on(tmp_path, out, to):
    def rows(index):
        return np.full((1, D), 1e5 if index == 2 else 1, np.float32)

    job = write_job(tmp_path / "job", bad=(0,), rows=rows)
    for written, kept in ((8, 0), (0, 8)):
        done = exported(job, out, to, dtype="float16")
        assert (done.written, done.kept, done.failed, done.overflowed) == (written, kept, 2, 1)
    if to == "safetensors":
        assert index_of(out)[2]["error"] == "the embedding has values that float16 cannot hold"
        assert not (out / "00000002.safetensors").exists()
    else:
        assert len(layerstack.read(out, skip_failed=True)) == 8


def test_constant_rows_that_a_dtype_cannot_hold_end_it_before_anything_is_written(tmp_path, out):
    with pytest.raises(PartFormatError, match="constant rows have values that float16 cannot hold"):
        exported(write_job(tmp_path / "job", prefix_rows=PREFIX * 1e6), out, dtype="float16")
    assert not out.exists()


def test_too_little_room_is_told_before_anything_is_written(job, out, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ExportError, match=r"takes about 3\d\.\d kB, and .* has 1\.0 kB free.*--layout own_rows"):
        exported(job, out)
    for to, layout in (("dense-parquet", "dense"), ("safetensors", "own_rows")):  # which has no, and is that layout
        with pytest.raises(ExportError, match=r"name a folder on another disk$"):
            exported(job, out, to, layout=layout)
    assert not out.exists()


@pytest.mark.parametrize("stored", ["own_rows", "dense"])
@pytest.mark.parametrize("is_right", [False, True])
def test_the_room_for_own_rows_is_that_of_all_of_them_wherever_pad_rows_are(
    tmp_path, out, monkeypatch, stored, is_right
):
    monkeypatch.setattr("layerstack.exportsurvey._FILE_BYTES", 0)
    padded = (
        {"rows": lambda _: np.ones((L - len(PREFIX), D), np.float32), "num_tokens": lambda _: 4} if is_right else {}
    )
    parts = Parts(open_source(write_job(tmp_path / "job", bad=(0, 5), layout=stored, **padded)))
    options = ExportOptions("safetensors", layout="own_rows")
    needed = needed_bytes(parts, survey(parts, options), parts.header, options)
    export(parts, out, options)
    assert needed == sum(tensor.nbytes for path in out.glob("*.safetensors") for tensor in load_file(path).values())


def test_rows_of_many_groups_are_exported_with_memory_for_one(tmp_path, out, monkeypatch):
    monkeypatch.setattr(part_files, "ROW_GROUP_BYTES", 100)
    job = write_job(tmp_path / "job", count=50, rows_per_part=20)
    assert pq.ParquetFile(job / "parts" / "00000.parquet").num_row_groups > 5
    exported(job, out)
    for index in range(50):
        np.testing.assert_array_equal(load_file(out / f"{index:08d}.safetensors")["prompt_embeds"], dense(index))


def test_rows_padded_at_the_right_keep_their_pad_rows(tmp_path, out):
    def rows(index):
        return np.random.default_rng(index).standard_normal((L - len(PREFIX), D)).astype(np.float32)

    job = write_job(tmp_path / "job", rows=rows, num_tokens=lambda _: 4)
    exported(job, out / "own", layout="own_rows")
    np.testing.assert_array_equal(load_file(out / "own" / "00000003.safetensors")["prompt_embeds"], rows(3))
    exported(job, out / "dense")
    np.testing.assert_array_equal(
        load_file(out / "dense" / "00000003.safetensors")["prompt_embeds"], np.concatenate([PREFIX, rows(3)])
    )


def test_a_damaged_part_is_named_and_what_is_written_stays(job, out):
    part = job / "parts" / "00001.parquet"
    column = pq.ParquetFile(part).metadata.row_group(0).column(3)
    content = bytearray(part.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 16] = b"\xff" * 16
    part.write_bytes(content)
    with pytest.raises(ReadError, match=r"00001\.parquet is damaged"):
        exported(job, out)
    assert (out / "00000003.safetensors").exists()
    assert not (out / "index.jsonl").exists()


@pytest.mark.parametrize("to", ["safetensors", "dense-parquet"])
def test_rows_of_a_part_that_is_not_what_the_manifest_says_are_not_exported(job, out, to):
    part = job / "parts" / "00001.parquet"
    content = part.read_bytes()
    column = pq.ParquetFile(part).metadata.row_group(0).column(3)
    assert column.path_in_schema == "prompt_embeds"
    place = column.data_page_offset + column.total_compressed_size - 1  # of a value: Parquet does not notice
    part.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(ReadError, match=r"00001\.parquet is damaged: its SHA-256 is not the manifest's"):
        exported(job, out, to)
    names = {path.name for path in out.rglob("*.*") if path.suffix in {".safetensors", ".parquet"}}
    assert names == ({f"0000000{n}.safetensors" for n in (1, 2, 3)} if to == "safetensors" else {"00000.parquet"})
    part.write_bytes(content)
    assert exported(job, out, to).kept == 3
    np.testing.assert_array_equal(layerstack.read(job, skip_failed=True)[3]["prompt_embeds"], dense(4))


def test_a_full_disk_is_an_error_that_leaves_no_half_file(tmp_path, out):
    job = write_job(tmp_path / "job")
    with files_up_to(500), pytest.raises(OSError, match="File too large"):
        exported(job, out)
    assert [path.name for path in out.iterdir()] == ["export.json"]
    assert exported(job, out).written == 10
