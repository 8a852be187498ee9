import base64
import hashlib

import httpx
import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from jobs.settings import Settings
from jobs.storage import Storage, open_storage
from jobs.store import JobStore
from tests.sample_jobs import announce, do_chunk, make_job
from tests.support import free_port, kind, status_of, wait_for


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
    assert kind(response) == (416, "range-not-satisfiable")
    assert response.headers["content-range"] == f"bytes */{len(content)}"


@pytest.mark.parametrize(
    "asked", ["bytes=-", "bytes=", "bytes=a-b", "bytes=0-3,5-7", "rows=0-3", "bytes=5-2", "bytes=" + "9" * 5000 + "-"]
)
def test_a_range_that_makes_no_sense_or_is_not_one_is_ignored(api, part, asked):
    url, content = part
    response = api.get(url, headers={"range": asked})
    assert (response.status_code, response.content) == (200, content)


def test_the_etag_and_the_digest_of_a_part_are_its_sha256(api, part):
    url, content = part
    digest = hashlib.sha256(content)
    for response in (api.get(url), api.head(url), api.get(url, headers={"range": "bytes=0-3"})):
        assert response.headers["etag"] == f'"{digest.hexdigest()}"'
        assert response.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"


def test_head_tells_what_get_would_and_sends_nothing(api, part):
    url, _ = part
    got, head = api.get(url), api.head(url, headers={"range": "bytes=0-3"})
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-type", "content-length", "content-disposition", "accept-ranges", "etag"):
        assert head.headers[name] == got.headers[name]
    assert api.head(f"{url}9").status_code == 404


@pytest.mark.parametrize(
    ("condition", "is_known"),
    [("{}", True), ("W/{}", True), ('"x", {}', True), ("*", True), ('"x"', False), ("x", False)],
)
def test_if_none_match_of_what_there_is_is_304(api, part, condition, is_known):
    url, content = part
    etag = api.head(url).headers["etag"]
    response = api.get(url, headers={"if-none-match": condition.format(etag)})
    if is_known:
        assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", etag)
    else:
        assert (response.status_code, response.content) == (200, content)


@pytest.mark.parametrize(
    ("condition", "is_right"),
    [("{}", True), ('"x", {}', True), ("*", True), ("W/{}", False), ('"x"', False), ("x", False)],
)
def test_if_match_of_something_else_is_412(api, part, condition, is_right):
    url, content = part
    etag = api.head(url).headers["etag"]
    response = api.get(url, headers={"if-match": condition.format(etag)})
    if is_right:
        assert (response.status_code, response.content) == (200, content)
    else:
        assert kind(response) == (412, "precondition-failed")
        assert response.json()["field"] == "If-Match"


@pytest.mark.parametrize(("condition", "counts"), [("{}", True), ("W/{}", False), ('"x"', False)])
def test_a_range_counts_only_if_if_range_names_what_there_is(api, part, condition, counts):
    url, content = part
    etag = api.head(url).headers["etag"]
    response = api.get(url, headers={"range": "bytes=0-3", "if-range": condition.format(etag)})
    assert (response.status_code, response.content) == ((206, content[:4]) if counts else (200, content))


def test_conditions_on_several_lines_are_one_list(api, part):
    url, _ = part
    etag = api.head(url).headers["etag"]
    response = api.get(url, headers=[("if-none-match", '"x"'), ("if-none-match", etag)])
    assert response.status_code == 304


def test_a_part_that_has_gone_since_it_was_looked_up_is_404(api, store, part, monkeypatch):
    url, _ = part
    name = store.part_name(url.split("/")[2], 0)
    stream = Storage.stream

    def late(storage, *arguments):
        storage.delete(name)
        return stream(storage, *arguments)

    monkeypatch.setattr(Storage, "stream", late)
    assert kind(api.get(url)) == (404, "not-there-yet")


def test_a_part_that_is_shorter_than_its_report_says_breaks_the_connection(lone_api, broker, tmp_path):
    url = lone_api(broker.url)
    store = JobStore(open_storage(str(tmp_path / "storage")))
    record = make_job(store)
    do_chunk(store, record, 0)
    name = store.part_name(record.id, 0)
    store.storage.write(name, store.storage.read(name)[:-1])
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{url}/jobs/{record.id}/parts/0")


# An object store that clients fetch from themselves.


@pytest.fixture
def signing(storage, storage_url, broker, redis):  # noqa: ARG001 - the storage has to be there
    """The API with links to the object store."""
    announce(redis)
    settings = Settings(broker_url=broker.url, storage=storage_url, presigned_url_s=60)
    with TestClient(create_app(settings), base_url="http://127.0.0.1", follow_redirects=False) as client:
        yield client


@pytest.mark.parametrize("storage_url", ["s3"], indirect=True)
def test_a_part_is_fetched_from_the_object_store_with_a_link_that_is_signed(signing, part):
    url, content = part
    response = signing.get(url)
    assert (response.status_code, response.content) == (307, b"")
    assert response.headers["cache-control"] == "no-store"
    location = response.headers["location"]
    assert "X-Amz-Expires=60" in location
    assert "anything" not in location  # the secret
    assert httpx.get(location).content == content
    assert httpx.get(location, headers={"range": "bytes=0-3"}).content == b"PAR1"


@pytest.mark.parametrize("storage_url", ["s3"], indirect=True)
def test_conditions_on_our_etag_are_met_by_the_server_itself(signing, part):
    url, content = part
    etag = signing.head(url).headers["etag"]
    assert signing.get(url, headers={"if-none-match": etag}).status_code == 304
    assert signing.get(url, headers={"if-match": etag}).content == content
    assert signing.get(url, headers={"if-range": etag, "range": "bytes=0-3"}).content == b"PAR1"


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_a_folder_has_no_links(signing, part):
    url, content = part
    assert signing.get(url).content == content


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
