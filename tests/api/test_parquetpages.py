import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.parquetpages import largest_page

SIZES = b"\x15\x00\x15\x0c\x15\x0a"  # a data page of 6 bytes, 5 as it lies there; more fields may follow
BODY = b"12345"


def largest(pages, **extent):
    return largest_page(io.BytesIO(pages), **{"start": 0, "length": len(pages)} | extent)


def test_the_largest_of_all_pages_of_a_chunk_is_told():
    content = io.BytesIO()
    prompts = [f"{n} {'x' * (n % 500)}" for n in range(5_000)]
    small = {"data_page_size": 1_000, "write_batch_size": 10, "use_dictionary": False, "compression": "zstd"}
    pq.write_table(pa.table({"prompt": prompts}), content, **small)
    chunk = pq.read_metadata(content).row_group(0).column(0)
    found = largest_page(content, chunk.data_page_offset, chunk.total_compressed_size)
    assert found > 1_000
    assert chunk.total_uncompressed_size > 20 * found


def test_a_chunk_without_pages_has_none():
    assert largest(b"") == 0


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        (b"", 6),
        (b"\x11\x12\x13\x05\x16\x80\x01\x17" + b"\x00" * 8, 6),  # bools, a byte, an i64 and a double
        (b"\x18\x03abc", 6),  # text
        (b"\x18\x80\x40" + b"x" * 2**13, 6),  # text that is longer than what is read at first
        (b"\x19\x35\x02\x04\x06", 6),  # a list of numbers
        (b"\x1a\xf1\x10" + b"\x01" * 16, 6),  # a set of 16 bools, its size by itself
        (b"\x1c\x15\x02\x1c\x18\x01a\x00\x00", 6),  # a struct in a struct
        (b"\x05\x04\x20", 16),  # the field again: the last counts
        (b"\x05\x84\x80\x08\x20", 16),  # the same, its id written so that only its last 16 bits are 2
        (b"\x06\x04\x20", 6),  # another type than the field has
    ],
)
def test_other_fields_of_a_header_are_skipped(fields, size):
    page = SIZES + fields + b"\x00" + BODY
    assert largest(page + page) == size


def test_what_is_larger_as_it_lies_there_counts_as_that():
    assert largest(b"\x15\x00\x15\x00\x15\x0a\x00" + BODY) == 5


@pytest.mark.parametrize(
    "page",
    [
        b"\x00",  # no sizes
        b"\x15\x00\x15\x0c\x00",  # one of them
        b"\x15\x00\x15\x0b\x15\x0a\x00" + BODY,  # a negative one
        SIZES,  # no end
        SIZES + b"\x18\xff\xff\xff\xff\x0f",  # text that goes on after the file
        SIZES + b"\x19\xf1\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a list that does
        SIZES + b"\x19\xfc\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        SIZES + b"\x15" + b"\x80" * 99,  # a number without end
        SIZES + b"\x1c" * 9_999,  # structs in structs
        SIZES + b"\x19" * 9_999,  # lists in lists
        SIZES + b"\x1b\x00\x00",  # a map, which no header has
        SIZES + b"\x1f\x00",  # a type that there is not
    ],
)
def test_what_is_no_page_header_is_a_value_error(page):
    with pytest.raises(ValueError, match="page header"):
        largest(page)


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, -1), (0, 13), (12, 1), (2**62, 1), (0, 2**63)])
def test_a_chunk_outside_the_file_is_a_value_error(start, length):
    with pytest.raises(ValueError, match="outside the file"):
        largest(SIZES + b"\x00" + BODY, start=start, length=length)


@given(st.binary(max_size=60), st.integers(0, 60))
def test_garbage_has_a_size_or_is_a_value_error(garbage, at):
    for pages in (garbage, SIZES[:at] + garbage, (SIZES + garbage)[:at]):
        try:
            assert largest(pages) >= 0
        except ValueError:
            continue
