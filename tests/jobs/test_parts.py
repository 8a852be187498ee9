import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import parts
from jobs.errors import PartFormatError
from jobs.parts import PART_SCHEMA, EncodedRow, PartHeader, PartWriter, open_part, read_header
from jobs.tensors import DTYPES, dense_rows

PREFIX = np.arange(8, dtype=np.float32).reshape(2, 4) / 3
PAD = np.array([9, 8, 7, 6], np.float32) / 7


def header(**fields):
    options = {"layout": "own_rows", "dtype": "float32"} | fields
    return PartHeader.build(**options, max_length=8, fingerprint="f", layers=(1, 2), prefix_rows=PREFIX, pad_row=PAD)


def written(rows, head, compression="none"):
    sink = io.BytesIO()
    with PartWriter(sink, head, compression) as part:
        for row in rows:
            part.write(row)
    return pq.ParquetFile(io.BytesIO(sink.getvalue()))


def row(index, n=3, **fields):
    own = np.full((n, 4), index + 0.1, np.float32)
    return EncodedRow(index, f"id{index}", f"prompt {index}", own, num_tokens=n + 2, truncated=False, **fields)


def test_the_schema_is_version_1():
    file = written([row(0)], header())
    assert file.schema_arrow.remove_metadata() == PART_SCHEMA
    assert str(PART_SCHEMA.field("prompt_embeds").type) == "large_binary"
    assert PART_SCHEMA.field("text_ids").type == pa.list_(pa.list_(pa.int64(), 4))
    assert PART_SCHEMA.names == [
        "index", "id", "prompt", "prompt_embeds", "text_ids", "num_tokens", "truncated", "error",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_own_rows_come_back_in_the_stored_dtype_with_their_positions(dtype, compression):
    file = written([row(0), row(1, n=5)], header(dtype=dtype), compression)
    second = file.read().to_pylist()[1]
    stored = np.frombuffer(second["prompt_embeds"], DTYPES[dtype]).reshape(-1, 4)
    np.testing.assert_array_equal(stored, np.full((5, 4), np.float32(1.1)).astype(DTYPES[dtype]))
    assert second["text_ids"] == [[0, 0, 0, position] for position in range(3, 8)]
    assert (second["index"], second["id"], second["prompt"]) == (1, "id1", "prompt 1")
    assert (second["num_tokens"], second["truncated"], second["error"]) == (7, False, None)


def test_the_dense_layout_stores_every_row():
    stored = written([row(0)], header(layout="dense")).read().to_pylist()[0]
    want = dense_rows(np.full((3, 4), np.float32(0.1)), prefix_rows=PREFIX, pad_row=PAD, max_length=8)
    np.testing.assert_array_equal(np.frombuffer(stored["prompt_embeds"], np.float32).reshape(8, 4), want)
    assert stored["text_ids"] == [[0, 0, 0, position] for position in range(8)]


def test_a_part_can_be_read_alone():
    found = read_header(written([row(0)], header(dtype="bfloat16")), "x")
    prefix, pad = found.constant_rows()
    np.testing.assert_array_equal(prefix, PREFIX.astype(DTYPES["bfloat16"]))
    np.testing.assert_array_equal(pad, PAD.astype(DTYPES["bfloat16"]))
    assert (found.schema_version, found.embed_dim, found.max_length, found.fingerprint) == (1, 4, 8, "f")


def test_a_row_that_failed_has_a_reason_and_nothing_else():
    good, bad = written([row(0), EncodedRow(1, "b", "bad", error="why")], header()).read().to_pylist()
    assert good["error"] is None
    assert bad == {
        "index": 1, "id": "b", "prompt": "bad", "prompt_embeds": None, "text_ids": None,
        "num_tokens": None, "truncated": None, "error": "why",
    }  # fmt: skip


@pytest.mark.parametrize("value", [1e6, np.nan, np.inf])
def test_values_that_the_dtype_cannot_hold_are_told_in_the_row(value):
    spoilt = EncodedRow(0, "a", "a", np.full((1, 4), value, np.float32), num_tokens=3, truncated=False)
    stored = written([spoilt, row(1)], header(dtype="float16")).read().to_pylist()
    assert stored[0]["prompt_embeds"] is None
    assert "float16 cannot hold" in stored[0]["error"]
    assert stored[1]["error"] is None


@pytest.mark.parametrize("constant", ["prefix_rows", "pad_row"])
def test_constants_that_the_dtype_cannot_hold_are_refused(constant):
    fields = {"prefix_rows": PREFIX, "pad_row": PAD}
    fields[constant] = fields[constant] * 1e6
    with pytest.raises(PartFormatError, match="constant rows have values that float16 cannot hold"):
        PartHeader.build(layout="own_rows", dtype="float16", max_length=8, fingerprint="f", layers=(1,), **fields)


def test_row_groups_stay_small(monkeypatch):
    monkeypatch.setattr(parts, "ROW_GROUP_BYTES", 100)  # a row has 48 bytes
    file = written([row(n) for n in range(7)], header())
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [3, 3, 1]
    assert file.read()["index"].to_pylist() == list(range(7))


def test_embeddings_are_stored_plain_without_statistics():
    column = written([row(0)], header()).metadata.row_group(0).column(PART_SCHEMA.get_field_index("prompt_embeds"))
    assert column.compression == "UNCOMPRESSED"
    assert column.statistics is None
    assert "PLAIN_DICTIONARY" not in column.encodings
    assert "RLE_DICTIONARY" not in column.encodings


def test_parquet_of_somebody_else_is_no_part(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with (
        open_part(tmp_path / "a.parquet") as file,
        pytest.raises(PartFormatError, match=r"a\.parquet is Parquet, but no"),
    ):
        read_header(file, "a.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"x" * 100 + b"PAR1"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "00000.parquet").write_bytes(content)
    with pytest.raises(PartFormatError, match=r"00000\.parquet is damaged"):
        open_part(tmp_path / "00000.parquet")
