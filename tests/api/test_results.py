import gzip
import io
import json

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import layerstack
from api.merged import merged_parts
from jobs.errors import RecordFormatError
from jobs.layout import job_names
from jobs.parts import HEADER_KEY
from jobs.results import finalise
from jobs.storage import open_storage
from jobs.store import JobStore
from tests.sample_jobs import do_chunk, make_job, write_part
from tests.support import kind

PARQUET = "application/vnd.apache.parquet"


def finished(store, bad=(), **options):
    """A job of ten prompts in three parts."""
    record = make_job(store, **options)
    for chunk in range(record.num_chunks):
        do_chunk(store, record, chunk, bad)
    assert finalise(store, record.id, read_all=False) == []
    return record


@pytest.fixture
def record(store):
    return finished(store)


# The manifest.


def test_the_manifest_is_json_with_an_etag(api, store, record):
    response = api.get(f"/jobs/{record.id}/results", headers={"accept-encoding": "identity"})
    assert response.headers["content-type"] == "application/json"
    assert response.json() == json.loads(store.manifest(record.id).model_dump_json())
    assert response.headers["content-length"] == str(len(response.content))
    etag = response.headers["etag"]
    assert etag.startswith('W/"')
    again = api.get(f"/jobs/{record.id}/results", headers={"if-none-match": etag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    head = api.head(f"/jobs/{record.id}/results")
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", etag)


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
@pytest.mark.parametrize(
    ("coding", "expand"),
    [("gzip", gzip.decompress), ("zstd", lambda c: zstandard.ZstdDecompressor().stream_reader(c).read())],
)
def test_the_manifest_comes_compressed_to_whoever_accepts_that(api, record, coding, expand):
    url = f"/jobs/{record.id}/results"
    plain = api.get(url, headers={"accept-encoding": "identity"})
    with api.stream("GET", url, headers={"accept-encoding": coding}) as response:
        content = b"".join(response.iter_raw())
    assert response.headers["content-encoding"] == coding
    assert response.headers["etag"] == plain.headers["etag"]
    assert {name.strip() for name in response.headers["vary"].split(",")} >= {"Accept", "Accept-Encoding"}
    assert expand(content) == plain.content


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
@pytest.mark.parametrize(
    ("accept", "query", "media_type"),
    [
        (None, {}, "application/json"),
        ("*/*", {}, "application/json"),
        (PARQUET, {}, PARQUET),
        (f"application/json;q=0.5, {PARQUET}", {}, PARQUET),
        (f"application/json, {PARQUET};q=0.5", {}, "application/json"),
        ("text/html, */*;q=0.1", {}, "application/json"),
        (None, {"format": "parquet"}, PARQUET),
        (PARQUET, {"format": "json"}, "application/json"),
        ("image/png", {"format": "parquet"}, PARQUET),
    ],
)
def test_accept_or_the_query_chooses_between_manifest_and_parquet(api, record, accept, query, media_type):
    headers = {"accept": accept} if accept else {}
    response = api.get(f"/jobs/{record.id}/results", headers=headers, params=query)
    assert (response.status_code, response.headers["content-type"]) == (200, media_type)
    assert "Accept" in response.headers["vary"]


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_what_there_is_not_is_406_or_422_that_names_it(api, record):
    response = api.get(f"/jobs/{record.id}/results", headers={"accept": "image/png"})
    assert kind(response) == (406, "not-acceptable")
    assert response.json()["field"] == "Accept"
    response = api.get(f"/jobs/{record.id}/results", params={"format": "csv"})
    assert kind(response) == (422, "invalid-request")
    assert response.json()["field"].endswith("format")


# All parts as one file.


def rows_of(content):
    return pq.read_table(io.BytesIO(content))


@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"layout": "dense", "dtype": "bfloat16"}])
def test_all_parts_come_as_one_file_with_the_same_rows(api, store, options):
    record = finished(store, bad={1, 5}, **options)
    response = api.get(f"/jobs/{record.id}/results", params={"format": "parquet"})
    assert response.headers["content-disposition"] == f'attachment; filename="{record.id}.parquet"'
    assert response.headers["accept-ranges"] == "none"
    parts = [store.storage.read(store.part_name(record.id, chunk)) for chunk in range(record.num_chunks)]
    merged = rows_of(response.content)
    assert merged.equals(pa.concat_tables(map(rows_of, parts)))
    assert merged["index"].to_pylist() == list(range(10))


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_one_file_is_made_as_a_part_is(api, store, compression):
    record = finished(store, compression=compression)
    content = api.get(f"/jobs/{record.id}/results", headers={"accept": PARQUET}).content
    part = pq.read_metadata(io.BytesIO(store.storage.read(store.part_name(record.id, 0))))
    merged = pq.read_metadata(io.BytesIO(content))
    assert merged.metadata[HEADER_KEY] == part.metadata[HEADER_KEY]
    assert merged.schema.to_arrow_schema() == part.schema.to_arrow_schema()
    assert [merged.row_group(group).num_rows for group in range(merged.num_row_groups)] == [4, 4, 2]
    for column in range(part.num_columns):
        ours, theirs = merged.row_group(0).column(column), part.row_group(0).column(column)
        for name in ("compression", "encodings", "is_stats_set", "has_dictionary_page", "total_uncompressed_size"):
            assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_the_one_file_is_read_as_the_jobs_folder_is(api, record, tmp_path):
    path = tmp_path / "all.parquet"
    path.write_bytes(api.get(f"/jobs/{record.id}/results", params={"format": "parquet"}).content)
    got, own = layerstack.read(path), layerstack.read(tmp_path / "storage" / job_names(record.id).folder)
    assert len(got) == len(own) == 10
    for one, other in zip(got, own, strict=True):
        assert (one["index"], one["id"], one["prompt"]) == (other["index"], other["id"], other["prompt"])
        np.testing.assert_array_equal(one["prompt_embeds"], other["prompt_embeds"])


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_all_parts_are_404_until_the_job_has_succeeded_and_410_once_they_have_expired(api, store, record):
    running = make_job(store)
    assert kind(api.get(f"/jobs/{running.id}/results", params={"format": "parquet"})) == (404, "not-there-yet")
    store.expire(record.id)
    assert kind(api.get(f"/jobs/{record.id}/results", params={"format": "parquet"})) == (410, "results-expired")


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_what_is_wrong_with_the_first_part_is_told_before_anything_is_sent(api, store, record):
    store.storage.write(store.part_name(record.id, 0), b"rubbish")
    assert kind(api.get(f"/jobs/{record.id}/results", params={"format": "parquet"})) == (500, "job-damaged")


def test_a_part_with_another_header_is_not_mixed_in(store, storage):
    record = make_job(store)
    for chunk in range(record.num_chunks):
        write_part(store, record, chunk, fingerprint="0123456789abcdef" if chunk < 2 else "another")
    with pytest.raises(RecordFormatError, match=r"00002\.parquet was made by another encoder"):
        list(merged_parts(storage, record))


def test_a_part_that_is_missing_breaks_the_download_off(lone_api, broker, tmp_path):
    url = lone_api(broker.url)
    store = JobStore(open_storage(str(tmp_path / "storage")))
    record = finished(store)
    store.storage.delete(store.part_name(record.id, 1))
    with httpx.stream("GET", f"{url}/jobs/{record.id}/results", params={"format": "parquet"}) as response:
        assert response.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            response.read()


def test_parts_are_read_one_after_the_other_as_the_client_reads(store, storage):
    record = make_job(store, count=40, chunk_rows=10)
    for chunk in range(record.num_chunks):
        do_chunk(store, record, chunk)
    pieces = merged_parts(storage, record)
    next(pieces)
    store.storage.delete(store.part_name(record.id, 3))  # not read yet
    with pytest.raises(RecordFormatError, match="missing"):
        list(pieces)
