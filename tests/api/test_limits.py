import gzip

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from jobs.settings import Settings
from tests.sample_jobs import announce
from tests.support import kind

JSON, TEXT = ("content-type", "application/json"), ("content-type", "text/plain")


@pytest.fixture
def api(broker, redis, tmp_path):
    """The API with a limit of 100 bytes for JSON and 1,000 for a file, or 2,000 expanded; and of 3 prompts in a job."""
    announce(redis)
    settings = Settings(
        broker_url=broker.url,
        storage=str(tmp_path),
        body_max_bytes=100,
        upload_max_bytes=1000,
        upload_max_expanded_bytes=2000,
        job_max_prompts=3,
    )
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        yield client


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "in pieces"])
@pytest.mark.parametrize(
    ("path", "headers", "limit"),
    [("/jobs", [JSON], 100), ("/jobs", [JSON, TEXT], 100), ("/jobs", [TEXT], 1000), ("/predict", [JSON], 100)],
)
def test_a_body_above_its_limit_is_413_whatever_a_second_content_type_says(api, path, headers, limit, declared):
    for size, allowed in ((limit, True), (limit + 1, False)):
        content = b" " * size
        response = api.post(path, content=content if declared else iter([content[:50], content[50:]]), headers=headers)
        if allowed:
            assert response.status_code != 413
        else:
            assert kind(response) == (413, "body-too-large")
            assert response.json()["limit"] == limit


@pytest.mark.parametrize("suffix", ["txt", "parquet"])
def test_a_compressed_file_above_its_expanded_limit_is_413_and_leaves_nothing(api, tmp_path, suffix):
    response = api.post("/jobs", files={"file": (f"a.{suffix}.gz", gzip.compress(b" " * 2001))})
    assert kind(response) == (413, "body-too-large")
    assert (response.json()["field"], response.json()["limit"]) == ("file", 2000)
    assert "expanded" in response.json()["detail"]
    assert not list(tmp_path.glob("jobs/*"))


@pytest.mark.parametrize("path", ["/jobs", "/predict"])
def test_json_has_the_same_limit_expanded_as_not_compressed(api, path):
    content = gzip.compress(b'{"prompts": ["' + b"a" * 100 + b'"]}')
    assert len(content) < 100
    response = api.post(path, content=content, headers=[JSON, ("content-encoding", "gzip")])
    assert kind(response) == (413, "body-too-large")
    assert (response.json()["field"], response.json()["limit"]) == ("body", 100)


@pytest.mark.parametrize(
    "arguments",
    [
        {"json": {"prompts": [""] * 4}},
        {"content": b"a\n" * 4, "headers": [TEXT]},
        {"files": {"file": ("a.txt", b"a\n" * 4)}},
    ],
    ids=["JSON", "body", "upload"],
)
def test_more_prompts_than_a_job_may_have_are_413_and_leave_nothing(api, tmp_path, arguments):
    response = api.post("/jobs", **arguments)
    assert kind(response) == (413, "too-many-prompts")
    assert (response.json()["field"], response.json()["limit"]) == ("prompts", 3)
    assert not list(tmp_path.glob("jobs/*"))


def test_as_many_prompts_as_a_job_may_have_are_taken(api):
    assert api.post("/jobs", json={"prompts": [""] * 3}).status_code == 202
