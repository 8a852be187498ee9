import errno
import io
from tempfile import SpooledTemporaryFile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from api.parquetfile import MAX_PAGE_BYTES, read_parquet
from api.problems import Problem

MAX_CHARS = 1000
LIMITS = {"value_max_bytes": 4 * MAX_CHARS, "max_chars": MAX_CHARS}
PLAIN = {"use_dictionary": False, "write_statistics": False}


def written(table, **options):
    content = io.BytesIO()
    pq.write_table(pa.table(table), content, **options)
    return content.getvalue()


def read(content, **limits):
    return list(read_parquet(io.BytesIO(content), **LIMITS | limits))


@pytest.fixture
def pool():
    """A memory pool that counts what arrow allocates from now on."""
    before = pa.default_memory_pool()
    counting = pa.proxy_memory_pool(before)
    pa.set_memory_pool(counting)
    yield counting
    pa.set_memory_pool(before)


@pytest.mark.parametrize(
    "text",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
@pytest.mark.parametrize("store_schema", [True, False])
def test_text_of_every_kind_is_read(text, store_schema):
    prompts = pa.array(["a", "", "雪", "a"]).cast(text)
    ids = pa.array(["x", None, "", "y"]).cast(text)
    assert read(written({"id": ids, "prompt": prompts}, store_schema=store_schema)) == [
        (0, "x", "a"), (1, None, ""), (2, "", "雪"), (3, "y", "a"),
    ]  # fmt: skip


@pytest.mark.parametrize("whole", [pa.int8(), pa.int64(), pa.uint64()], ids=str)
def test_ids_that_are_numbers_become_text(whole):
    content = written({"prompt": ["a", "b"], "id": pa.array([7, None], whole)})
    assert read(content) == [(0, "7", "a"), (1, None, "b")]


def test_ids_of_which_none_is_known_are_none():
    assert read(written({"prompt": ["a"], "id": pa.nulls(1)})) == [(0, None, "a")]


def test_other_columns_are_not_read():
    content = bytearray(written({"image": ["PIXELS" * 10], "prompt": ["a"]}, compression="none", use_dictionary=False))
    column = pq.read_metadata(io.BytesIO(content)).row_group(0).column(0)
    end = column.data_page_offset + column.total_compressed_size
    content[column.data_page_offset : end] = b"\xff" * column.total_compressed_size
    assert read(content) == [(0, None, "a")]


def test_rows_are_counted_across_batches_and_row_groups():
    prompts = [str(n) for n in range(50_000)]
    assert read(written({"prompt": prompts}, row_group_size=20_000)) == [(n, None, str(n)) for n in range(50_000)]


def test_a_table_without_rows_has_no_prompts():
    assert read(written({"prompt": pa.array([], pa.string())})) == []


def test_a_row_group_is_not_held_in_memory():
    prompts = [f"{n:05} {'x' * 990}" for n in range(60_000)]
    content = written({"prompt": prompts}, row_group_size=60_000, use_dictionary=False, compression="none")
    assert len(content) > 59_000_000
    before = pa.total_allocated_bytes()
    rows = read_parquet(io.BytesIO(content), value_max_bytes=800_000, max_chars=200_000)
    held = [pa.total_allocated_bytes() - before for _ in rows]
    assert len(held) == 60_000
    assert max(held) < 6_000_000


PROMPTS = ["", "雪 🦊", *(f"{n} {'x' * (n % 90)} {n % 7}" for n in range(3_000))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "none"},
        *({"compression": codec, **PLAIN} for codec in ("none", "snappy", "gzip", "brotli", "lz4", "zstd")),
        {"compression": "zstd", "data_page_version": "2.0"},
        {"compression": "none", "data_page_version": "2.0", **PLAIN},
        {"compression": "zstd", "data_page_version": "2.0", **PLAIN},
        {"row_group_size": 7},
        {"row_group_size": 1_000, "data_page_size": 100, "write_batch_size": 1},
        {"dictionary_pagesize_limit": 1_000, "data_page_size": 1_000, "write_page_checksum": True},
        {"use_dictionary": False, "column_encoding": {"prompt": "DELTA_BYTE_ARRAY"}},
        {"use_dictionary": ["id"], "column_encoding": {"prompt": "DELTA_LENGTH_BYTE_ARRAY"}},
        {"write_page_index": True, "version": "1.0"},
    ],
    ids=str,
)
def test_rows_are_the_same_however_the_pages_were_written(options):
    ids = [None if n % 3 == 0 else f"id{n}" for n in range(len(PROMPTS))]
    content = written({"other": [[n] for n in range(len(PROMPTS))], "id": ids, "prompt": PROMPTS}, **options)
    assert read(content) == list(zip(range(len(PROMPTS)), ids, PROMPTS, strict=True))


def test_a_page_as_large_as_duckdb_writes_them_is_read():
    prompts = [f"{n:05} {'x' * 990}" for n in range(100_000)]
    one_page = {"data_page_size": 2**30, "max_rows_per_page": 2**30, "compression": "zstd", **PLAIN}
    content = written({"prompt": prompts}, **one_page)
    assert [prompt for _, _, prompt in read(content)] == prompts


def test_a_page_that_is_larger_decompressed_is_refused_before_it_is():
    content = written({"prompt": ["x" * (MAX_PAGE_BYTES + 1)]}, compression="zstd", **PLAIN)
    assert len(content) < 10_000
    with pytest.raises(Problem, match="a page has at most 134217728 bytes, decompressed; got 1342177") as caught:
        read(content)
    assert (caught.value.status_code, caught.value.members["field"], caught.value.members["limit"]) == (
        422, "file", 2**27,
    )  # fmt: skip


def in_a_dictionary(text, num_rows):
    column = pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), [text])
    return written({"prompt": column}, compression="zstd", write_statistics=False)


def in_pages_of_their_own(text, num_rows):
    one_row = {"write_batch_size": 1, "data_page_size": 1}
    return written({"prompt": [text] * num_rows}, compression="zstd", **one_row, **PLAIN)


def after_the_value_before(text, num_rows):
    return written({"prompt": [text] * num_rows}, compression="zstd", column_encoding="DELTA_BYTE_ARRAY", **PLAIN)


@pytest.mark.parametrize("write", [in_a_dictionary, in_pages_of_their_own, after_the_value_before])
@pytest.mark.parametrize("value_max_bytes", [4_000, 2**24], ids=["refused", "taken"])
def test_a_few_bytes_that_mean_many_long_values_do_not_fill_the_memory(write, value_max_bytes, pool):
    text = "x" * 2**24
    content = write(text, 40)
    assert len(content) < 200_000
    before = pool.max_memory()
    rows = read_parquet(io.BytesIO(content), value_max_bytes=value_max_bytes, max_chars=value_max_bytes // 4)
    if value_max_bytes < len(text):
        with pytest.raises(Problem, match="row 0: prompt has more than 4000 bytes; a prompt has at most 1000"):
            next(rows)
    else:
        assert sum(prompt == text for _, _, prompt in rows) == 40
    assert pool.max_memory() - before < 2**28


def test_a_value_that_is_too_long_is_named_by_its_row_before_it_is_text():
    prompts = [str(n) for n in range(30_000)]
    prompts[29_990] = "雪" * 2_000
    with pytest.raises(Problem, match="row 29990: prompt has more than 4000 bytes") as caught:
        read(written({"prompt": prompts}, row_group_size=20_000))
    assert (caught.value.kind, caught.value.members) == ("prompt-too-long", {"field": "row 29990", "limit": MAX_CHARS})


def test_an_upload_is_read_from_where_it_lies_and_stays_open():
    with SpooledTemporaryFile(max_size=10) as file:
        file.write(written({"prompt": ["a"]}))
        file.seek(0)
        assert list(read_parquet(file, **LIMITS)) == [(0, None, "a")]
        assert not file.closed


@pytest.mark.parametrize(
    ("table", "field", "said"),
    [
        ({"caption": ["a"]}, "file", "needs one column 'prompt', and has at most one 'id'; got ['caption']"),
        ({"prompt": [1]}, "prompt", "the column must be text; got 'int64'"),
        ({"prompt": [b"a"]}, "prompt", "the column must be text; got 'binary'"),
        ({"prompt": [["a"]]}, "prompt", "the column must be text; got 'list"),
        ({"prompt": [{"id": "a"}]}, "prompt", "the column must be text; got 'struct"),
        ({"prompt": ["a"], "id": [1.5]}, "id", "the column must be text or whole numbers; got 'double'"),
        ({"prompt": ["a"], "id": [True]}, "id", "the column must be text or whole numbers; got 'bool'"),
        ({"prompt": ["a", None]}, "row 1", "row 1: a prompt is text, perhaps empty; got None"),
    ],
)
def test_a_wrong_column_or_row_is_an_error_that_names_it(table, field, said):
    with pytest.raises(Problem) as caught:
        read(written(table))
    assert (caught.value.status_code, caught.value.members["field"]) == (422, field)
    assert said in caught.value.detail


def test_a_column_that_is_there_twice_is_refused():
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    with pytest.raises(Problem, match="needs one column 'prompt'"):
        read(written(table))


def test_text_that_is_not_utf8_is_an_error_that_names_the_row():
    offsets, characters = pa.array([0, 1, 3, 4], pa.int32()), b"a\xff\xfeb"
    text = pa.Array.from_buffers(pa.string(), 3, [None, offsets.buffers()[1], pa.py_buffer(characters)])
    with pytest.raises(Problem, match=r"row 1: prompt must be UTF-8 .*; got b'\\xff\\xfe'"):
        read(written({"prompt": text}))


@pytest.mark.parametrize(
    "content",
    [b"", b"PAR1", b"nonsense", b"a fox\na hen\n", b"PAR1\x00\x00\x00\x00PAR1", b"PAR1\xff\xff\xff\xffPAR1", b"P" * 99],
)
def test_what_is_no_parquet_is_a_problem(content):
    with pytest.raises(Problem, match="file: ") as caught:
        read(content)
    assert (caught.value.status_code, caught.value.members["field"]) == (422, "file")


def test_a_footer_that_is_too_large_is_not_read():
    with pytest.raises(Problem, match="the footer has at most 4194304 bytes") as caught:
        read(bytes(2**22 + 1) + (2**22 + 1).to_bytes(4, "little") + b"PAR1")
    assert caught.value.members["limit"] == 2**22


@pytest.mark.parametrize("options", [{}, {"compression": "zstd", "use_dictionary": False}], ids=str)
def test_damage_anywhere_is_a_problem_or_goes_unseen_and_is_never_another_error(options):
    whole = written({"id": ["x", "y"], "prompt": ["a fox", "雪"]}, **options)
    num_problems = 0
    for at in range(len(whole)):
        content = bytearray(whole)
        content[at] ^= 0xFF
        try:
            read(content)
        except Problem:
            num_problems += 1
    assert num_problems > len(whole) / 4


def test_damage_that_a_checksum_shows_is_a_problem():
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    content = written({"prompt": ["a fox"]}, **plain, write_page_checksum=True)
    with pytest.raises(Problem, match="CRC"):
        read(content.replace(b"a fox", b"a box", 1))


def test_a_disk_that_fails_is_not_blamed_on_the_file():
    class Failing(io.BytesIO):
        def read(self, *_size):
            raise OSError(errno.EIO, "the disk failed")

    with pytest.raises(OSError, match="the disk failed"):
        list(read_parquet(Failing(written({"prompt": ["a"]})), **LIMITS))
