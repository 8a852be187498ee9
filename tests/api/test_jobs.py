import io
import json
import signal
import time

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

import layerstack
from api.app import create_app
from jobs import keys
from jobs.layout import job_names
from jobs.messages import JobEvent
from jobs.results import finalise
from jobs.settings import Settings
from tests.sample_jobs import INFO, announce, do_chunk, make_job
from tests.support import files_up_to, kind, wait_for

UNKNOWN = "01M8259KQ6ZM43ZW7F9E4YQJWV"


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


def test_a_running_job_can_be_cancelled_and_goes_on_after_a_retry(http, stack):
    prompts = [f"prompt number {n}" for n in range(1_500)]
    job_id = http.post("/jobs", json={"prompts": prompts, "options": {"chunk_rows": 25}}).json()["id"]
    wait_for(lambda: http.get(f"/jobs/{job_id}").json()["num_parts_done"] > 0)
    assert http.post(f"/jobs/{job_id}/cancel").json()["status"] in {"cancelling", "cancelled"}
    wait_for(lambda: http.get(f"/jobs/{job_id}").json()["status"] == "cancelled")
    stopped = http.get(f"/jobs/{job_id}").json()
    assert 0 < stopped["num_parts_done"] < 60
    assert stopped["num_done"] == 25 * stopped["num_parts_done"]
    http.post(f"/jobs/{job_id}/retry")
    job = finished(http, job_id)
    assert (job["status"], job["num_done"], job["num_failed"]) == ("succeeded", 1_500, 0)
    assert [part for part in job["parts"] if part in stopped["parts"]] == stopped["parts"]
    tables = (pq.read_table(io.BytesIO(http.get(part["url"]).content), columns=["prompt"]) for part in job["parts"])
    assert [prompt for table in tables for prompt in table["prompt"].to_pylist()] == prompts
    assert http.delete(f"/jobs/{job_id}").status_code == 204
    assert not (stack.storage / "jobs" / job_id).exists()


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


@pytest.mark.parametrize("path", ["", "/results", "/parts/0"])
@pytest.mark.parametrize("job_id", ["nonsense", "01M8259KQ6ZM43ZW7F9E4YQJWV", "..%2F..%2Fetc", "%00"])
def test_an_unknown_job_is_404(http, job_id, path):
    response = http.get(f"/jobs/{job_id}{path}")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


def test_without_a_broker_a_job_is_refused_and_nothing_is_stored(lone_api, tmp_path):
    url = lone_api(f"unix://{tmp_path}/nobody")
    response = httpx.post(f"{url}/jobs", json={"prompts": ["a"]}, timeout=30)
    assert (response.status_code, response.json()["type"]) == (503, "urn:layerstack:problem:broker-unavailable")
    assert int(response.headers["retry-after"]) > 0
    assert not list((tmp_path / "storage").glob("jobs/*"))


# A job on its way, with the test in the place of the workers.


@pytest.fixture
def record(store):
    """A job of three chunks, the first of which is done."""
    made = make_job(store)
    do_chunk(store, made, 0)
    return made


def finish(store, record):
    for chunk in range(1, record.num_chunks):
        do_chunk(store, record, chunk)
    assert finalise(store, record.id, read_all=False) == []


def told(redis):
    """Ids of the jobs that the reconciler has been told of, since this was last asked."""
    contents = redis.lpop(keys.EVENTS, 100) or []
    return [JobEvent.model_validate_json(content).job_id for content in contents]


def test_a_new_job_is_shown_with_an_estimate_of_its_size_and_workers_are_told(api, redis):
    options = {"layout": "dense", "chunk_rows": 2, "chunk_tokens": 32, "deduplicate": False}
    job = api.post("/jobs", json={"prompts": ["a", "b", "c"], "options": options}).json()
    assert (job["status"], job["num_parts"], job["num_done"], job["error"]) == ("queued", 2, 0, None)
    rows, constant_rows = 3 * INFO.max_length, 2 * (INFO.num_prefix_tokens + 1)
    assert job["estimated_bytes"] == rows * (4 * INFO.embed_dim + 32) + constant_rows * 4 * INFO.embed_dim * 4 // 3
    assert job["options"] == {"dtype": "float32", "compression": "none", "on_error": "continue", **options}
    assert told(redis) == [job["id"]]


def test_progress_is_what_parts_and_workers_tell(api, redis, record):
    redis.hset(keys.progress(record.id), mapping={"0": 4, "1": 3})
    job = api.get(f"/jobs/{record.id}").json()
    assert (job["status"], job["num_done"], job["num_parts_done"]) == ("running", 7, 1)


def test_parts_are_shown_in_pages(api, store):
    record = make_job(store, count=5, chunk_rows=1)
    for chunk in (0, 1, 3, 4):
        do_chunk(store, record, chunk)

    def page(**params):
        job = api.get(f"/jobs/{record.id}", params=params).json()
        return [part["index"] for part in job["parts"]], job["parts_next"]

    assert page() == ([0, 1, 3, 4], None)
    assert page(parts_limit=2) == ([0, 1], 1)
    assert page(parts_limit=2, parts_after=1) == ([3, 4], None)
    assert page(parts_limit=0) == ([], None)
    for params in ({"parts_limit": 1001}, {"parts_limit": -1}, {"parts_after": "x"}):
        response = api.get(f"/jobs/{record.id}", params=params)
        assert kind(response) == (422, "invalid-request")
        assert next(iter(params)) in response.json()["field"]


def test_a_queued_job_tells_its_place_in_the_queue(api, redis, store):
    jobs = [make_job(store).id for _ in range(2)]
    assert api.get(f"/jobs/{jobs[1]}").json()["queue_position"] is None
    redis.set(keys.QUEUE, json.dumps(jobs))
    assert [api.get(f"/jobs/{job_id}").json()["queue_position"] for job_id in jobs] == [0, 1]


def test_a_job_that_waits_says_why(api, redis, record):
    redis.set(keys.trouble(record.id), "the storage is full")
    job = api.get(f"/jobs/{record.id}").json()
    assert (job["status"], job["error"]) == ("paused", "the storage is full")


def test_what_is_not_there_yet_is_404_that_tells_the_status(api, record):
    for path in ("parts/1", "results"):
        response = api.get(f"/jobs/{record.id}/{path}")
        assert kind(response) == (404, "not-there-yet")
        assert "running" in response.json()["detail"]
    for number in (3, 10**300):
        response = api.get(f"/jobs/{record.id}/parts/{number}")
        assert kind(response) == (404, "part-not-found")
        assert "its parts are 0 to 2" in response.json()["detail"]


def test_a_cancelled_job_stops_and_its_parts_stay(api, redis, store, record):
    redis.hset(keys.progress(record.id), "1", 3)
    response = api.post(f"/jobs/{record.id}/cancel")
    assert (response.status_code, response.json()["status"]) == (202, "cancelling")
    assert store.is_cancelled(record.id)
    assert redis.exists(keys.cancelled(record.id))
    assert told(redis) == [record.id]
    redis.delete(keys.progress(record.id))  # its worker has put it down
    job = api.post(f"/jobs/{record.id}/cancel").json()
    assert (job["status"], job["num_done"]) == ("cancelled", 4)
    assert len(api.get(job["parts"][0]["url"]).content) == job["parts"][0]["bytes"]


def test_retry_lets_a_cancelled_job_go_on(api, redis, store, record):
    api.post(f"/jobs/{record.id}/cancel")
    told(redis)
    response = api.post(f"/jobs/{record.id}/retry")
    assert (response.status_code, response.json()["status"]) == (202, "running")
    assert not store.is_cancelled(record.id)
    assert not redis.exists(keys.cancelled(record.id))
    assert told(redis) == [record.id]


def test_a_failed_job_says_why_and_retry_lets_it_go_on(api, store, record):
    for chunk in (1, 2):
        store.note_failure(record.id, chunk, "no way", crashed=False, limit=1)
    job = api.get(f"/jobs/{record.id}").json()
    assert (job["status"], job["num_parts_failed"]) == ("failed", 2)
    assert job["error"] == "chunk 1, after 1 attempt: no way (and 1 more chunks)"
    assert api.post(f"/jobs/{record.id}/retry").json()["status"] == "running"


def test_a_finished_job_cannot_be_cancelled_but_checked_again(api, store, record):
    finish(store, record)
    assert kind(api.post(f"/jobs/{record.id}/cancel")) == (409, "job-state")
    assert api.get(f"/jobs/{record.id}").json()["status"] == "succeeded"
    assert api.post(f"/jobs/{record.id}/retry").json()["status"] == "running"
    assert kind(api.get(f"/jobs/{record.id}/results")) == (404, "not-there-yet")


def test_an_expired_job_is_shown_and_its_results_are_410(api, store, record):
    finish(store, record)
    store.expire(record.id)
    job = api.get(f"/jobs/{record.id}").json()
    assert (job["status"], job["num_failed"], job["parts"]) == ("expired", 0, [])
    for path in ("parts/0", "results"):
        assert kind(api.get(f"/jobs/{record.id}/{path}")) == (410, "results-expired")
    for call in ("retry", "cancel"):
        assert kind(api.post(f"/jobs/{record.id}/{call}")) == (409, "job-state")


def test_a_deleted_job_is_gone(api, store, record):
    other = make_job(store)
    assert api.delete(f"/jobs/{record.id}").status_code == 204
    for path in ("", "/results", "/parts/0"):
        assert kind(api.get(f"/jobs/{record.id}{path}")) == (404, "job-not-found")
    assert [job["id"] for job in api.get("/jobs").json()["jobs"]] == [other.id]
    assert kind(api.delete(f"/jobs/{record.id}")) == (404, "job-not-found")


@pytest.mark.parametrize("job_id", ["nonsense", UNKNOWN])
def test_an_unknown_job_cannot_be_changed(api, job_id):
    for call in ("cancel", "retry"):
        assert kind(api.post(f"/jobs/{job_id}/{call}")) == (404, "job-not-found")
    assert kind(api.delete(f"/jobs/{job_id}")) == (404, "job-not-found")


def test_without_a_broker_jobs_are_shown_and_changed_all_the_same(api, broker, store, record):
    broker.process.terminate()
    broker.process.wait()
    assert api.get(f"/jobs/{record.id}").json()["num_done"] == 4
    assert api.get(f"/jobs/{record.id}/parts/0").status_code == 200
    assert api.post(f"/jobs/{record.id}/cancel").json()["status"] == "cancelled"
    assert api.post(f"/jobs/{record.id}/retry").json()["status"] == "running"
    assert api.delete(f"/jobs/{record.id}").status_code == 204
    assert list(store.newest()) == []


def test_a_broker_that_hangs_delays_a_page_of_jobs_no_more_than_one_job(api, broker, store, record):
    jobs = [record.id, *(make_job(store).id for _ in range(4))]
    broker.process.send_signal(signal.SIGSTOP)
    try:
        begun = time.monotonic()
        api.get(f"/jobs/{record.id}")
        for_one = time.monotonic() - begun
        page = api.get("/jobs").json()["jobs"]
        for_all = time.monotonic() - begun - for_one
    finally:
        broker.process.send_signal(signal.SIGCONT)
    assert [job["id"] for job in page] == jobs[::-1]
    assert page[-1]["num_done"] == 4
    assert for_all < 2 * for_one


def test_a_list_tells_of_each_job_what_workers_tell(api, redis, store, record):
    other = make_job(store)
    redis.hset(keys.progress(record.id), "1", 3)
    redis.set(keys.trouble(other.id), "the storage is full")
    found = [(job["id"], job["num_done"], job["status"], job["error"]) for job in api.get("/jobs").json()["jobs"]]
    assert found == [(other.id, 0, "paused", "the storage is full"), (record.id, 7, "running", None)]


def test_a_job_that_cannot_be_read_is_told_as_such_and_hides_no_other(api, store, record):
    damaged = make_job(store)
    store.storage.write(job_names(damaged.id).record, b"rubbish")
    assert kind(api.get(f"/jobs/{damaged.id}")) == (500, "job-damaged")
    assert [job["id"] for job in api.get("/jobs").json()["jobs"]] == [record.id]


# A storage that has no room, or does not work.


def test_a_job_whose_results_would_not_fit_is_507_with_the_limit(broker, redis, tmp_path):
    announce(redis)
    settings = Settings(broker_url=broker.url, storage=str(tmp_path), storage_reserve_bytes=2**62)
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as api:
        response = api.post("/jobs", json={"prompts": ["a"]})
    assert kind(response) == (507, "not-enough-space")
    problem = response.json()
    assert (problem["field"], problem["limit"]) == ("prompts", 0)
    assert problem["needed"] > 0
    assert not list(tmp_path.glob("jobs/*"))


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_a_full_storage_is_507_and_keeps_nothing(api, store):
    prompt = "".join(map(chr, range(0x4E00, 0x5E00)))
    with files_up_to(4096):
        response = api.post("/jobs", json={"prompts": [prompt]})
    assert kind(response) == (507, "storage-full")
    assert store.storage.folders("jobs") == []


def test_a_storage_that_does_not_work_is_503_and_not_the_clients_business(bucket, broker, redis):
    announce(redis)
    settings = Settings(broker_url=broker.url, storage=f"{bucket}-that-is-gone")
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as api:
        for response in (api.get("/jobs"), api.post("/jobs", json={"prompts": ["a"]})):
            assert kind(response) == (503, "storage-unavailable")
            assert int(response.headers["retry-after"]) > 0
            assert "bucket" not in response.text
        assert api.get("/ready").json()["checks"]["storage"].startswith("cannot be used")
