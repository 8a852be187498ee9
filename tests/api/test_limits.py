import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from jobs.settings import Settings
from tests.sample_jobs import announce
from tests.support import kind

JSON, TEXT = ("content-type", "application/json"), ("content-type", "text/plain")


@pytest.fixture
def api(broker, redis, tmp_path):
    """The API with a limit of 100 bytes for JSON and 1,000 for a file."""
    announce(redis)
    settings = Settings(broker_url=broker.url, storage=str(tmp_path), body_max_bytes=100, upload_max_bytes=1000)
    with TestClient(create_app(settings)) as client:
        yield client


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "in pieces"])
@pytest.mark.parametrize(
    ("path", "headers", "limit"),
    [("/jobs", [JSON], 100), ("/jobs", [JSON, TEXT], 100), ("/jobs", [TEXT], 1000), ("/predict", [TEXT], 100)],
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
