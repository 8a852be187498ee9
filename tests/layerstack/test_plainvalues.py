import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.parts import PART_SCHEMA
from layerstack.plainvalues import plain_value

VALUES = [bytes([n]) * (100 + 7 * n) for n in range(10)]


@pytest.fixture
def write(tmp_path):
    """Write values as a row group of a part -> the file, mapped, and the group's metadata."""

    def make(values, **options):
        rows = [{"index": n, "prompt_embeds": value} for n, value in enumerate(values)]
        options = {"compression": "none", "use_dictionary": False} | options
        pq.write_table(pa.Table.from_pylist(rows, PART_SCHEMA), tmp_path / "part", **options)
        return pa.memory_map(str(tmp_path / "part")), pq.read_metadata(tmp_path / "part").row_group(0)

    return make


def sizes(values):
    """Of each, its own size and one that it does not have."""
    return [{len(value), 5000} for value in values]


def test_every_value_is_found_in_place(write):
    mapped, group = write(VALUES)
    before = pa.total_allocated_bytes()
    found = [plain_value(mapped, group, sizes(VALUES[n:])) for n in range(10)]
    assert pa.total_allocated_bytes() == before
    assert [value.to_pybytes() for value in found] == VALUES


def test_nulls_take_no_room(write):
    mapped, group = write([None, *VALUES[:3], None, *VALUES[3:], None])
    assert plain_value(mapped, group, sizes(VALUES)).to_pybytes() == VALUES[0]


@pytest.mark.parametrize(
    "options", [{"compression": "zstd"}, {"use_dictionary": True}, {"data_page_size": 1, "write_batch_size": 1}]
)
def test_values_that_lie_otherwise_are_not_found(write, options):
    mapped, group = write(VALUES, **options)
    assert plain_value(mapped, group, sizes(VALUES)) is None


def test_another_size_than_expected_is_not_found(write):
    mapped, group = write(VALUES)
    assert plain_value(mapped, group, [{99}, *sizes(VALUES[1:])]) is None
    assert plain_value(mapped, group, [*sizes(VALUES[:-1]), {99}]) is None
    assert plain_value(mapped, group, sizes([b"x" * 10**6])) is None


def test_two_sizes_that_both_fit_are_not_decided_upon(write):
    value = (10).to_bytes(4, "little") + b"x" * 10
    mapped, group = write([value])
    assert plain_value(mapped, group, [{10, len(value)}]) is None


def test_a_value_behind_very_many_is_not_looked_for(write):
    mapped, group = write([b"x"] * 65)
    assert plain_value(mapped, group, [{1}] * 65) is None
    assert plain_value(mapped, group, [{1}] * 64).to_pybytes() == b"x"
