import numpy as np
import pyarrow.parquet as pq
import pytest

import layerstack
from jobs import parts as part_files
from layerstack.errors import ReadError, RowFailedError
from layerstack.inspection import Lengths, inspect_parts, read_prompt
from layerstack.scan import Parts
from layerstack.sources import open_source
from tests.layerstack.jobs_on_disk import LAYERS, D, L, P, own_rows, write_job


def opened(path):
    return Parts(open_source(path))


def inspected(path):
    return inspect_parts(opened(path))


@pytest.fixture
def job(tmp_path):
    return write_job(tmp_path / "job", bad=(0, 5), cut=(4, 9))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_summary_counts_what_was_written(tmp_path, dtype):
    found = inspected(write_job(tmp_path / "job", bad=(0, 5), cut=(4, 9), dtype=dtype)).summary
    lengths = [len(own_rows(index)) + P for index in range(10) if index not in {0, 5}]
    assert (found.rows, found.succeeded, found.failed, found.truncated) == (10, 8, 2, 2)
    assert (found.parts, found.tokens) == (3, sum(lengths))
    assert (found.dtype, found.layers, found.embed_dim, found.max_length) == (dtype, LAYERS, D, L)
    assert (found.num_prefix_rows, found.layout, found.compression) == (P, "own_rows", "none")
    assert found.columns["prompt_embeds"] == "large_binary"
    assert [(row.index, row.id, row.error) for row in found.errors] == [(0, "id0", "why"), (5, "id5", "why")]
    assert found.num_tokens.max == max(lengths)
    assert found.own_rows.mean == pytest.approx(np.mean(lengths) - P, abs=0.01)
    assert found.dense_bytes == 8 * L * (D * (4 if dtype == "float32" else 2) + 32)
    assert found.bytes == sum(path.stat().st_size for path in (tmp_path / "job" / "parts").iterdir())


def test_a_part_a_folder_of_parts_and_a_job_are_inspected_alike(job):
    assert inspected(job).summary.rows == inspected(job / "parts").summary.rows == 10
    assert inspected(job / "parts" / "00001.parquet").summary.rows == 4


def test_dense_parts_tell_how_many_own_rows_their_prompts_have(tmp_path):
    found = inspected(write_job(tmp_path / "job", layout="dense"))
    assert found.summary.own_rows == Lengths.of(np.array([len(own_rows(index)) for index in range(10)]))


@pytest.mark.parametrize("layout", ["own_rows", "dense"])
@pytest.mark.parametrize("longest", [0, 1, 5])
def test_rows_padded_at_the_right_are_all_own_rows_but_the_prefix_wherever_a_full_prompt_is(tmp_path, layout, longest):
    def rows(index):
        return np.random.default_rng(index).standard_normal((L - P, D)).astype(np.float32)

    def num_tokens(index):
        return L if index == longest else P + 1 + index % 3

    job = write_job(tmp_path / "job", bad=(3,), rows=rows, num_tokens=num_tokens, layout=layout)
    found = inspected(job)
    assert found.summary.own_rows == Lengths.of(np.full(9, L - P))
    assert (found.summary.num_tokens.min, found.summary.num_tokens.max) == (P + 1, L)
    stored = layerstack.read(job, layout="own_rows", tensors="numpy", skip_failed=True)
    assert {len(row["prompt_embeds"]) for row in stored} == {L - P}


@pytest.mark.parametrize("layout", ["own_rows", "dense"])
def test_own_rows_are_counted_too_where_every_prompt_fills_all_rows(tmp_path, layout):
    rows = np.ones((L - P, D), np.float32)
    found = inspected(write_job(tmp_path / "job", rows=lambda _: rows, layout=layout))
    assert found.summary.own_rows == Lengths.of(np.full(10, L - P))


def test_95_percent_of_the_lengths_are_at_most_one_of_them():
    assert Lengths.of(np.array([1, 2, 3, 100])).p95 == 100
    assert Lengths.of(np.arange(1, 21)).p95 == 19
    assert Lengths.of(np.array([1, 2])).median == 1.5


def test_without_a_row_that_succeeded_there_are_no_lengths(tmp_path):
    found = inspected(write_job(tmp_path / "job", count=3, bad=(0, 1, 2)))
    assert (found.summary.num_tokens, found.summary.times_smaller, len(found.num_tokens)) == (None, None, 0)
    with pytest.raises(ReadError, match="none of the 3 rows has an embedding"):
        read_prompt(opened(tmp_path / "job"))


def test_no_embedding_is_read_to_count(tmp_path):
    part = write_job(tmp_path / "job", dtype="float32") / "parts" / "00000.parquet"
    column = pq.ParquetFile(part).metadata.row_group(0).column(3)
    assert column.path_in_schema == "prompt_embeds"
    content = bytearray(part.read_bytes())
    start, size = column.data_page_offset, column.total_compressed_size
    content[start : start + size] = b"\xff" * size
    part.write_bytes(content)
    assert inspected(part).summary.rows == 4
    with pytest.raises(ReadError, match=r"00000\.parquet is damaged"):
        read_prompt(opened(part))


@pytest.mark.parametrize("layout", ["own_rows", "dense"])
def test_one_prompt_is_read_by_its_position_whatever_the_row_groups(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(part_files, "ROW_GROUP_BYTES", 100)
    found = opened(write_job(tmp_path / "job", bad=(0, 5), layout=layout))
    prompt = read_prompt(found, 7)
    assert (prompt.index, prompt.id, prompt.prompt, prompt.num_tokens) == (7, "id7", "p7", 3 + P)
    np.testing.assert_array_equal(prompt.own_rows, own_rows(7))
    assert read_prompt(found).position == 1


def test_a_prompt_that_failed_or_is_not_there_says_so(job):
    with pytest.raises(RowFailedError, match="row 5 has no embedding: why"):
        read_prompt(opened(job), 5)
    for position in (-1, 10):
        with pytest.raises(ReadError, match=f"no row {position}: the rows are 0 to 9"):
            read_prompt(opened(job), position)
