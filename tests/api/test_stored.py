import httpx
import pytest

from tests.sample_jobs import do_chunk, make_job
from tests.support import free_port, status_of, wait_for


@pytest.fixture
def part(store):
    """The URL of a part, and its content."""
    record = make_job(store)
    do_chunk(store, record, 0)
    return f"/jobs/{record.id}/parts/0", store.storage.read(store.part_name(record.id, 0))


def test_a_whole_part_comes_with_its_type_length_and_name(api, part):
    url, content = part
    response = api.get(url)
    assert (response.status_code, response.content) == (200, content)
    assert response.headers["content-type"] == "application/vnd.apache.parquet"
    assert response.headers["content-length"] == str(len(content))
    assert response.headers["accept-ranges"] == "bytes"
    job_id = url.split("/")[2]
    assert f'filename="{job_id}-00000.parquet"' in response.headers["content-disposition"]


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-3", 0, 4),
        ("bytes=5-5", 5, 6),
        ("bytes=100-", 100, None),
        ("bytes=-4", -4, None),
        ("bytes=0-", 0, None),
        ("bytes=7-999999999", 7, None),
        ("bytes=-999999999", 0, None),
    ],
)
def test_a_range_of_a_part_can_be_fetched(api, part, asked, start, stop):
    url, content = part
    response = api.get(url, headers={"range": asked})
    want, first = content[start:stop], start % len(content)
    assert (response.status_code, response.content) == (206, want)
    assert response.headers["content-range"] == f"bytes {first}-{first + len(want) - 1}/{len(content)}"
    assert response.headers["content-length"] == str(len(want))


@pytest.mark.parametrize("asked", ["bytes=999999999-", "bytes=-0"])
def test_a_range_outside_of_a_part_is_416_with_its_size(api, part, asked):
    url, content = part
    response = api.get(url, headers={"range": asked})
    assert response.status_code == 416
    assert response.headers["content-range"] == f"bytes */{len(content)}"


@pytest.mark.parametrize("storage_url", ["s3"], indirect=True)
@pytest.mark.parametrize(
    "asked", ["bytes=-", "bytes=", "bytes=a-b", "bytes=0-3,5-7", "rows=0-3", "bytes=5-2", "bytes=" + "9" * 5000 + "-"]
)
def test_a_range_that_makes_no_sense_or_is_not_one_is_ignored(api, part, asked):
    url, content = part
    response = api.get(url, headers={"range": asked})
    assert (response.status_code, response.content) == (200, content)


@pytest.mark.parametrize("storage_url", ["s3"], indirect=True)
def test_prompts_become_parts_in_an_object_store_through_processes_of_their_own(
    spawn, broker, tiny, storage_url, store
):
    port = free_port()
    shared = {"broker_url": broker.url, "storage": storage_url}
    api = spawn("api", port=port, **shared)
    worker = spawn("worker", model=tiny, device="cpu", **shared)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        wait_for(lambda: status_of(f"{http.base_url}/ready") == 200, worker, worker.log)
        prompts = [f"prompt {n}" for n in range(7)]
        job = http.post("/jobs", json={"prompts": prompts, "options": {"chunk_rows": 3}}).json()
        wait_for(lambda: http.get(f"/jobs/{job['id']}").json()["status"] == "succeeded", worker, worker.log)
        manifest = http.get(f"/jobs/{job['id']}/results").json()
        assert (manifest["rows"], manifest["succeeded"], len(manifest["parts"])) == (7, 7, 3)
        for part in manifest["parts"]:
            content = store.storage.read(store.part_name(job["id"], part["index"]))
            url = f"/jobs/{job['id']}/parts/{part['index']}"
            assert http.get(url).content == content
            answer = http.get(url, headers={"range": "bytes=4-99"})
            assert (answer.status_code, answer.content) == (206, content[4:100])
        assert http.post(f"/jobs/{job['id']}/cancel").status_code == 409
        assert http.delete(f"/jobs/{job['id']}").status_code == 204
        assert list(store.newest()) == []
    assert api.poll() is None
