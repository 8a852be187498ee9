import gzip
import json
import tempfile

import pytest
import zstandard

from api.jobrequest import MAX_JSON_PROMPTS, MAX_METADATA
from jobs.records import MAX_CHUNK_TOKENS
from tests.support import files_up_to, kind


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "prompts"),
        ({"prompts": []}, "prompts"),
        ({"prompts": "a"}, "prompts"),
        ({"prompts": ["a", 5]}, "prompts.1"),
        ({"prompts": [{"id": "x"}]}, "prompts.0.prompt"),
        ({"prompts": [{"prompt": "a", "id": "x" * 513}]}, "prompts.0.id"),
        ({"prompts": ["x" * 200_001]}, "prompts.0"),
        ({"prompts": ["a"], "more": 1}, "more"),
        ({"prompts": ["a"], "options": {"dtype": "int8"}}, "options.dtype"),
        ({"prompts": ["a"], "options": {"layout": "sparse"}}, "options.layout"),
        ({"prompts": ["a"], "options": {"chunk_rows": 0}}, "options.chunk_rows"),
        ({"prompts": ["a"], "options": {"chunk_tokens": 0}}, "options.chunk_tokens"),
        ({"prompts": ["a"], "options": {"chunk_tokens": MAX_CHUNK_TOKENS + 1}}, "options.chunk_tokens"),
        ({"prompts": ["a"], "options": {"deduplicate": "yes"}}, "options.deduplicate"),
        ({"prompts": ["a"], "options": {"speed": 1}}, "options.speed"),
        ({"prompts": ["a"], "metadata": {"k": 1}}, "metadata.k"),
        ({"prompts": ["a"], "metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"prompts": ["a"], "metadata": {str(n): n for n in range(17)}}, "metadata"),
        ({"prompts": ["a"]} | {f"more{n}": 1 for n in range(99)}, "more0"),
        ({"prompts": [{"prompt": "a"} | {f"more{n}": 1 for n in range(99)}]}, "prompts.0.more0"),
        ({"prompts": ["a"], "options": {f"more{n}": 1 for n in range(99)}}, "options.more0"),
        ({"prompts": [5] * 100}, "prompts.0"),
    ],
)
def test_bad_input_is_a_problem_that_names_the_field(http, stack, body, field):
    before = set(stack.storage.glob("jobs/*"))
    response = http.post("/jobs", json=body)
    assert (response.status_code, response.json()["field"]) == (422, field)
    assert response.headers["content-type"] == "application/problem+json"
    assert len(response.json().get("errors", [])) <= 1
    assert set(stack.storage.glob("jobs/*")) == before


def test_more_prompts_than_a_json_body_may_have_are_pointed_to_a_file(http):
    response = http.post("/jobs", json={"prompts": [""] * (MAX_JSON_PROMPTS + 1)})
    assert kind(response) == (422, "invalid-request")
    problem = response.json()
    assert (problem["field"], problem["limit"], problem["see"]) == ("prompts", 100_000, "/jobs")
    assert "at most 100000 prompts" in problem["detail"]
    assert ".jsonl" in problem["detail"]


@pytest.mark.parametrize(
    ("request_arguments", "status"),
    [
        ({"files": {"file": ("a.png", b"x")}}, 415),
        ({"files": {"other": ("a.txt", b"x")}}, 422),
        ({"files": {"file": ("a.txt", b"")}}, 422),
        ({"files": {"file": ("a.txt", b"\xff")}}, 422),
        ({"files": {"file": ("a.txt", b"a")}, "data": {"options": "nonsense"}}, 422),
        ({"files": {"file": ("a.txt", b"a")}, "data": {"optoins": "{}"}}, 422),
        ({"files": {"file": ("a.txt", b"a")}, "data": {"metadata": "[]"}}, 422),
        ({"files": {"file": ("a.txt", b"a")}, "data": {"metadata": "[" * 1000}}, 422),
        ({"files": {"file": ("a.png.gz", b"x")}}, 415),
        ({"files": {"file": ("a.gz", b"x")}}, 415),
        ({"files": {"file": ("a.txt.gz", b"a fox")}}, 422),
        ({"files": {"file": ("a.txt", b"a")}, "headers": {"content-encoding": "gzip"}}, 415),
        ({"content": b"a", "headers": {"content-type": "text/plain", "content-encoding": "br"}}, 415),
        ({"content": b"a", "headers": {"content-type": "text/plain"}, "params": {"metadata": '{"a": 1}'}}, 422),
        ({"json": {"prompts": ["a"]}, "params": {"metadata": "{}"}}, 422),
        ({"files": {"file": ("a.txt", b"a")}, "data": {"options": json.dumps({str(n): n for n in range(99)})}}, 422),
        ({"files": [("file", (f"{n}.txt", b"a")) for n in range(3)]}, 400),
        ({"json": {"prompts": ["a"]}, "params": {"options": "{}"}}, 422),
        ({"content": b"a", "headers": {"content-type": "image/png"}}, 415),
        ({}, 415),
        ({"content": b"nonsense", "headers": {"content-type": "application/json"}}, 422),
        ({"content": b'{"prompts": ["\\ud800"]}', "headers": {"content-type": "application/json"}}, 422),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 422),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 400),
    ],
)
def test_a_bad_upload_is_a_client_error(http, request_arguments, status):
    response = http.post("/jobs", **request_arguments)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"files": [("file", ("a.txt", b"a")), ("file", ("b.txt", b"b"))]}, "file"),
        ({"files": [("file", ("a.txt", b"a")), ("file", (None, b"b"))]}, "file"),
        ({"files": {"file": ("a.txt", b"a")}, "data": {"options": ["{}", '{"layout": "dense"}']}}, "options"),
        ({"files": {"file": ("a.txt", b"a")}, "data": {"metadata": ["{}", "{}"]}}, "metadata"),
    ],
)
def test_a_file_or_options_given_twice_are_refused_and_not_dropped(http, arguments, field):
    response = http.post("/jobs", **arguments)
    assert kind(response) == (422, "invalid-request")
    assert (response.json()["field"], response.json()["limit"]) == (field, 1)
    assert f"has one '{field}'; got 2" in response.json()["detail"]


def test_a_file_name_that_is_no_text_is_shown_as_far_as_it_is(http):
    content = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a\\ud800.png"\r\n\r\na\r\n--x--\r\n'
    headers = {"content-type": "multipart/form-data; boundary=x; charset=unicode_escape"}
    response = http.post("/jobs", content=content, headers=headers)
    assert kind(response) == (415, "unsupported-media-type")
    assert response.json()["detail"].startswith("a?.png: neither")


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
@pytest.mark.parametrize("how", ["multipart", "body"])
def test_no_room_for_an_upload_is_507_that_names_the_temporary_folder(api, store, how, caplog):
    content = b"a fox\n" * 500_000
    as_file = {"content": content, "headers": {"content-type": "text/plain"}}
    with files_up_to(2**21):
        response = api.post("/jobs", **({"files": {"file": ("a.txt", content)}} if how == "multipart" else as_file))
    assert kind(response) == (507, "temporary-folder-full")
    assert (response.json()["field"], "TMPDIR" in response.json()["detail"]) == ("file", True)
    assert tempfile.gettempdir() in caplog.text
    assert store.storage.folders("jobs") == []


METADATA = {"set": "barns", "split": "train"}


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
@pytest.mark.parametrize(
    "arguments",
    [
        {"json": {"prompts": ["a"], "metadata": METADATA}},
        {"content": b"a", "headers": {"content-type": "text/plain"}, "params": {"metadata": json.dumps(METADATA)}},
        {"files": {"file": ("a.txt", b"a")}, "params": {"metadata": json.dumps(METADATA)}},
        {"files": {"file": ("a.txt", b"a")}, "data": {"metadata": json.dumps(METADATA)}, "params": {"metadata": "{}"}},
    ],
    ids=["JSON", "body", "upload with a query", "upload"],
)
def test_metadata_comes_with_prompts_of_each_kind(api, arguments):
    assert api.post("/jobs", **arguments).json()["metadata"] == METADATA


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({str(n): "" for n in range(MAX_METADATA + 1)}, "metadata"),
        ({"k": 1}, "metadata.k"),
        ({"k": "x" * 513}, "metadata.k"),
        ({"k" * 513: "x"}, "metadata." + "k" * 513),
    ],
)
def test_metadata_beside_a_file_has_the_limits_of_a_json_body(api, store, metadata, field):
    text = json.dumps(metadata)
    responses = [
        api.post("/jobs", files={"file": ("a.txt", b"a")}, data={"metadata": text}),
        api.post("/jobs", content=b"a", headers={"content-type": "text/plain"}, params={"metadata": text}),
        api.post("/jobs", json={"prompts": ["a"], "metadata": metadata}),
    ]
    for response in responses:
        assert kind(response) == (422, "invalid-request")
        assert response.json()["field"].startswith(field)
    assert store.storage.folders("jobs") == []


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
@pytest.mark.parametrize("suffix", ["txt", "parquet"])
def test_an_upload_that_is_cut_off_leaves_nothing(api, store, suffix):
    content = gzip.compress(b"a fox\n" * 100_000)[:-100]
    response = api.post("/jobs", files={"file": (f"a.{suffix}.gz", content)})
    assert kind(response) == (422, "invalid-request")
    assert response.json()["field"] == "file"
    assert store.storage.folders("jobs") == []


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_a_compressed_parquet_file_that_has_no_room_expanded_is_507(api, store):
    content = zstandard.compress(b"\0" * 2**23)
    with files_up_to(2**21):
        response = api.post("/jobs", files={"file": ("a.parquet.zst", content)})
    assert kind(response) == (507, "temporary-folder-full")
    assert store.storage.folders("jobs") == []
