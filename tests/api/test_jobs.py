import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

import layerstack
from tests.support import wait_for


def finished(http, job_id):
    wait_for(lambda: http.get(f"/jobs/{job_id}").json()["status"] not in {"queued", "running"})
    return http.get(f"/jobs/{job_id}").json()


def test_json_prompts_become_parquet_in_input_order(http, stack, reference):
    prompts = ["a fox", {"id": "seven", "prompt": "a hen"}, "", {"prompt": "雪"}]
    response = http.post("/jobs", json={"prompts": prompts, "metadata": {"set": "demo"}, "options": {"chunk_rows": 3}})
    assert response.status_code == 202
    job_id = response.json()["id"]
    assert response.headers["location"] == f"/jobs/{job_id}"
    job = finished(http, job_id)
    assert (job["status"], job["num_done"], job["num_failed"], job["metadata"]) == ("succeeded", 4, 0, {"set": "demo"})
    assert [part["index"] for part in job["parts"]] == [0, 1]
    rows = layerstack.read(stack.storage / "jobs" / job_id)
    assert [(row["index"], row["id"]) for row in rows] == [(0, "0"), (1, "seven"), (2, "2"), (3, "3")]
    want = reference(["a fox", "a hen", "", "雪"])
    for row, dense in zip(rows, want, strict=True):
        np.testing.assert_allclose(row["prompt_embeds"], dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["multipart", "body"])
@pytest.mark.parametrize(
    ("name", "media_type", "content"),
    [("p.txt", "text/plain", b"a fox\na hen\n"), ("p.jsonl", "application/jsonl", b'"a fox"\n{"prompt": "a hen"}\n')],
)
def test_a_file_is_taken_as_upload_and_as_body(http, how, name, media_type, content):
    options = json.dumps({"dtype": "bfloat16", "layout": "dense"})
    if how == "multipart":
        response = http.post("/jobs", files={"file": (name, content)}, data={"options": options})
    else:
        response = http.post(
            "/jobs", content=content, headers={"content-type": media_type}, params={"options": options}
        )
    assert response.status_code == 202
    job = finished(http, response.json()["id"])
    assert (job["status"], job["num_prompts"]) == ("succeeded", 2)
    assert (job["options"]["dtype"], job["options"]["layout"]) == ("bfloat16", "dense")
    table = pq.read_table(io.BytesIO(http.get(job["parts"][0]["url"]).content))
    assert table["prompt"].to_pylist() == ["a fox", "a hen"]
    assert [len(value) for value in table["prompt_embeds"].to_pylist()] == [512 * 96 * 2] * 2


def test_parts_can_be_fetched_in_ranges_and_are_not_sent_twice(http):
    job = finished(http, http.post("/jobs", json={"prompts": ["a"]}).json()["id"])
    url = job["parts"][0]["url"]
    whole = http.get(url)
    assert whole.headers["content-type"] == "application/vnd.apache.parquet"
    assert len(whole.content) == job["parts"][0]["bytes"]
    first = http.get(url, headers={"range": "bytes=0-3"})
    assert (first.status_code, first.content) == (206, b"PAR1")
    assert http.get(url, headers={"range": "bytes=-4"}).content == whole.content[-4:]
    assert whole.headers["etag"]


def test_the_manifest_is_the_result(http):
    job = finished(http, http.post("/jobs", json={"prompts": ["a", "b"]}).json()["id"])
    manifest = http.get(f"/jobs/{job['id']}/results").json()
    assert (manifest["rows"], manifest["succeeded"], manifest["failed"]) == (2, 2, 0)
    assert manifest["parts"][0]["bytes"] == job["parts"][0]["bytes"]


def test_jobs_are_listed_newest_first_in_pages(http):
    ids = [http.post("/jobs", json={"prompts": ["a"]}).json()["id"] for _ in range(3)]
    page = http.get("/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in page["jobs"]] == ids[:0:-1]
    assert page["next"] == ids[1]
    older = http.get("/jobs", params={"limit": 1, "after": page["next"]}).json()
    assert [job["id"] for job in older["jobs"]] == ids[:1]
    finished(http, ids[-1])


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
        ({"prompts": ["a"], "options": {"speed": 1}}, "options.speed"),
        ({"prompts": ["a"], "metadata": {"k": 1}}, "metadata.k"),
        ({"prompts": ["a"], "metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ],
)
def test_bad_input_is_a_problem_that_names_the_field(http, stack, body, field):
    before = len(list((stack.storage / "jobs").iterdir()))
    response = http.post("/jobs", json=body)
    assert (response.status_code, response.json()["field"]) == (422, field)
    assert response.headers["content-type"] == "application/problem+json"
    assert len(list((stack.storage / "jobs").iterdir())) == before


@pytest.mark.parametrize(
    ("request_arguments", "status"),
    [
        ({"files": {"file": ("a.png", b"x")}}, 415),
        ({"files": {"other": ("a.txt", b"x")}}, 422),
        ({"files": {"file": ("a.txt", b"")}}, 422),
        ({"files": {"file": ("a.txt", b"\xff")}}, 422),
        ({"files": {"file": ("a.txt", b"a")}, "data": {"options": "nonsense"}}, 422),
        ({"files": {"file": ("a.txt", b"a")}, "data": {"optoins": "{}"}}, 422),
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


@pytest.mark.parametrize("path", ["", "/results", "/parts/0"])
@pytest.mark.parametrize("job_id", ["nonsense", "01M8259KQ6ZM43ZW7F9E4YQJWV", "..%2F..%2Fetc", "%00"])
def test_an_unknown_job_is_404(http, job_id, path):
    response = http.get(f"/jobs/{job_id}{path}")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


def test_a_part_that_is_not_there_yet_is_404_that_tells_the_status(http):
    job_id = http.post("/jobs", json={"prompts": ["a"] * 60}).json()["id"]
    for path in ("parts/0", "results"):
        problem = http.get(f"/jobs/{job_id}/{path}").json()
        assert problem["status"] == 404
        assert "queued" in problem["detail"] or "running" in problem["detail"]
    for number in (1, 10**300):
        problem = http.get(f"/jobs/{job_id}/parts/{number}").json()
        assert problem["type"] == "urn:layerstack:problem:part-not-found"
        assert "its parts are 0 to 0" in problem["detail"]
    finished(http, job_id)


def test_without_a_broker_a_job_is_refused_and_nothing_is_stored(lone_api, tmp_path):
    import httpx

    url = lone_api(f"unix://{tmp_path}/nobody")
    response = httpx.post(f"{url}/jobs", json={"prompts": ["a"]}, timeout=30)
    assert (response.status_code, response.json()["type"]) == (503, "urn:layerstack:problem:broker-unavailable")
    assert int(response.headers["retry-after"]) > 0
    assert not list((tmp_path / "storage").glob("jobs/*"))
