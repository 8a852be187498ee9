import gzip
import io

import pyarrow.parquet as pq
import pytest
import zstandard

from api.compressed import Coding, content_coding, expanded, file_coding
from api.problems import Problem

CONTENT = b"a fox\na hen\n" * 1000
CODED = {Coding.GZIP: gzip.compress(CONTENT), Coding.ZSTD: zstandard.compress(CONTENT)}


def read(coded, coding, max_bytes=10**6):
    return expanded(io.BytesIO(coded), coding, max_bytes=max_bytes, field="file").read()


@pytest.mark.parametrize("coding", Coding)
def test_content_is_expanded_while_it_is_read(coding):
    file = expanded(io.BytesIO(CODED[coding]), coding, max_bytes=len(CONTENT), field="file")
    assert file.readline() == b"a fox\n"
    assert file.read() == CONTENT[6:]


@pytest.mark.parametrize("coding", Coding)
def test_members_in_a_row_are_one_content(coding):
    assert read(CODED[coding] * 3, coding) == CONTENT * 3


@pytest.mark.parametrize("coding", Coding)
@pytest.mark.parametrize(
    "damage",
    [lambda coded: coded[:-5], lambda coded: coded[:9], lambda coded: coded + b"more", lambda _: b"a fox\n" * 9],
    ids=["cut off", "cut off at the beginning", "with something behind it", "not compressed"],
)
def test_what_is_damaged_or_cut_off_is_a_problem_that_names_the_field(coding, damage):
    with pytest.raises(Problem) as caught:
        read(damage(CODED[coding]), coding)
    assert (caught.value.status_code, caught.value.members["field"]) == (422, "file")
    assert f"file: damaged or cut off {coding}, after" in caught.value.detail


@pytest.mark.parametrize("coding", Coding)
def test_content_above_the_limit_is_413_that_names_the_expanded_size(coding):
    with pytest.raises(Problem) as caught:
        read(CODED[coding], coding, max_bytes=len(CONTENT) - 1)
    assert (caught.value.status_code, caught.value.kind) == (413, "body-too-large")
    assert caught.value.members == {"field": "file", "limit": len(CONTENT) - 1}
    assert "expanded" in caught.value.detail


@pytest.mark.parametrize(("window_log", "fits"), [(27, True), (28, False)])
def test_a_zstd_window_of_more_than_128_mib_is_refused(window_log, fits):
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, compression_level=1)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    coded = compressor.compress(CONTENT) + compressor.flush()
    if fits:
        assert read(coded, Coding.ZSTD) == CONTENT
    else:
        with pytest.raises(Problem, match="too much memory"):
            read(coded, Coding.ZSTD)


def test_a_fault_of_our_disk_is_not_the_clients():
    class Broken(io.RawIOBase):
        def readable(self):
            return True

        def read(self, _size=-1):
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        expanded(Broken(), Coding.GZIP, max_bytes=10, field="file").read()


@pytest.mark.parametrize(
    ("header", "coding"),
    [
        (None, None),
        ("", None),
        ("identity", None),
        ("gzip", Coding.GZIP),
        (" GZip ", Coding.GZIP),
        ("x-gzip", Coding.GZIP),
        ("zstd", Coding.ZSTD),
    ],
)
def test_a_known_content_encoding_is_found(header, coding):
    assert content_coding(header) is coding


@pytest.mark.parametrize("header", ["br", "gzip, zstd", "deflate"])
def test_an_unknown_content_encoding_is_415_that_tells_the_known_ones(header):
    with pytest.raises(Problem) as caught:
        content_coding(header)
    assert caught.value.status_code == 415
    assert caught.value.headers == {"Accept-Encoding": "gzip, zstd"}


@pytest.mark.parametrize(
    ("filename", "media_type", "found"),
    [
        ("p.jsonl.gz", "application/octet-stream", (Coding.GZIP, "p.jsonl")),
        ("P.CSV.ZST", None, (Coding.ZSTD, "P.CSV")),
        ("p.jsonl", "application/gzip", (Coding.GZIP, "p.jsonl")),
        ("p.jsonl", "application/zstd", (Coding.ZSTD, "p.jsonl")),
        ("p.jsonl", "application/jsonl", (None, "p.jsonl")),
        (None, None, (None, None)),
    ],
)
def test_a_files_name_or_else_its_type_tells_how_it_is_compressed(filename, media_type, found):
    assert file_coding(filename, media_type) == found


# Through the API.

ROWS = ["a fox", "a hen"]


def parquet():
    import pyarrow as pa

    file = io.BytesIO()
    pq.write_table(pa.table({"prompt": ROWS}), file)
    return file.getvalue()


FILES = {
    "txt": ("text/plain", b"a fox\na hen\n"),
    "jsonl": ("application/jsonl", b'"a fox"\n{"prompt": "a hen"}\n'),
    "csv": ("text/csv", b"prompt\na fox\na hen\n"),
    "parquet": ("application/vnd.apache.parquet", parquet()),
}
COMPRESS = {"gzip": (gzip.compress, "gz"), "zstd": (zstandard.compress, "zst")}


def stored(store, job_id):
    return [prompt.prompt for _, prompt in store.prompts(job_id, 0)]


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
@pytest.mark.parametrize("coding", COMPRESS)
@pytest.mark.parametrize("suffix", FILES)
def test_a_compressed_file_of_each_kind_is_read_as_body_and_as_upload(api, store, suffix, coding):
    media_type, content = FILES[suffix]
    compress, ending = COMPRESS[coding]
    headers = {"content-type": media_type, "content-encoding": coding}
    as_body = api.post("/jobs", content=compress(content), headers=headers)
    as_upload = api.post("/jobs", files={"file": (f"prompts.{suffix}.{ending}", compress(content))})
    for response in (as_body, as_upload):
        assert response.status_code == 202
        assert stored(store, response.json()["id"]) == ROWS


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
@pytest.mark.parametrize("coding", COMPRESS)
def test_json_may_come_compressed(api, store, coding):
    compress, _ = COMPRESS[coding]
    headers = {"content-type": "application/json", "content-encoding": coding}
    response = api.post("/jobs", content=compress(b'{"prompts": ["a fox", "a hen"]}'), headers=headers)
    assert response.status_code == 202
    assert stored(store, response.json()["id"]) == ROWS
