import base64

import numpy as np
import pytest

from jobs import parts as part_files
from layerstack.errors import ReadError
from layerstack.scan import Parts
from layerstack.sources import open_source
from tests.layerstack.jobs_on_disk import PAD, PREFIX, D, L, P, own_rows, write_job


def opened(path):
    return Parts(open_source(path))


def mixed(folder, **header):
    """A folder of parts, one of which has another header."""
    one, other = write_job(folder / "a"), write_job(folder / "b", **header)
    (other / "parts" / "00001.parquet").replace(one / "parts" / "00001.parquet")
    return one / "parts"


def test_parts_of_two_encoders_do_not_go_together(tmp_path):
    with pytest.raises(ReadError, match=r"00001\.parquet .* do not belong together.*fingerprints g and f"):
        opened(mixed(tmp_path, prefix_rows=PREFIX + 1, fingerprint="g"))


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"dtype": "float16"}, "dtype is float16 and float32"),
        ({"layout": "dense"}, "layout is dense and own_rows"),
        ({"dtype": "bfloat16", "layout": "dense"}, "layout is dense and own_rows; dtype is bfloat16 and float32"),
        ({"pad_row": PAD + 1}, "their pad_row differ"),
    ],
)
def test_parts_of_one_encoder_that_differ_otherwise_are_told_in_what(tmp_path, header, said):
    with pytest.raises(ReadError, match=rf"do not belong together, though one encoder made both: {said}$"):
        opened(mixed(tmp_path, **header))


@pytest.mark.parametrize("layout", ["own_rows", "dense"])
def test_own_rows_are_counted_as_they_are_read(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(part_files, "ROW_GROUP_BYTES", 100)
    parts = opened(write_job(tmp_path / "job", bad=(0, 5), layout=layout))
    counts = np.concatenate([parts.num_own_rows(group) for group in parts.groups(parts.length_columns)])
    assert counts.tolist() == [len(own_rows(index)) for index in range(10) if index not in {0, 5}]
    found = [
        (row["index"], group.num_own_rows(place), group.own_rows(place))
        for group in parts.groups()
        for place, row in enumerate(group.rows)
        if row["error"] is None
    ]
    assert len(found) == 8
    for index, count, rows in found:
        assert count == len(rows)
        np.testing.assert_array_equal(rows, own_rows(index))


def test_the_constants_are_decoded_once_whatever_the_number_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(part_files, "ROW_GROUP_BYTES", 100)
    parts = opened(write_job(tmp_path / "job", layout="dense"))
    monkeypatch.setattr(base64, "b64decode", lambda _: pytest.fail("decoded"))
    rows = [group.own_rows(place) for group in parts.groups() for place in range(group.num_rows)]
    assert len(rows) == 10


def test_the_row_at_a_position_is_found_in_its_group(tmp_path, monkeypatch):
    monkeypatch.setattr(part_files, "ROW_GROUP_BYTES", 100)
    parts = opened(write_job(tmp_path / "job"))
    for position in range(parts.num_rows):
        group, place = parts.group_with(position)
        assert group.rows[place]["index"] == position
    with pytest.raises(IndexError):
        parts.group_with(parts.num_rows)


def test_what_footers_say_is_known_at_once(tmp_path):
    parts = opened(write_job(tmp_path / "job"))
    assert [part.num_rows for part in parts.parts] == [4, 4, 2]
    assert (parts.num_rows, parts.header.max_length, parts.header.embed_dim, parts.compression) == (10, L, D, "none")
    assert parts.prefix_rows.shape == (P, D)


def test_a_damaged_part_is_named(tmp_path):
    job = write_job(tmp_path / "job")
    (job / "parts" / "00002.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(ReadError, match=r"00002\.parquet is damaged or no Parquet"):
        opened(job / "parts")
