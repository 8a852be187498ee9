import re

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from api.securityheaders import page_policy
from jobs.settings import Settings
from tests.sample_jobs import announce
from tests.support import kind

HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}
STRICT = "default-src 'none'; frame-ancestors 'none'"


@pytest.fixture
def api(broker, redis, tmp_path):
    """The API with a key, and a route that fails."""
    announce(redis)
    app = create_app(Settings(broker_url=broker.url, storage=str(tmp_path), api_keys="ann:" + "0" * 64))

    @app.get("/docs/broken")
    def broken() -> None:
        raise RuntimeError("a fault of ours")

    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "status"), [("/health", 200), ("/jobs", 401), ("/docs/nowhere", 404), ("/docs/broken", 500)]
)
def test_every_answer_has_them(api, path, status):
    response = api.get(path)
    assert response.status_code == status
    assert {name: response.headers[name] for name in HEADERS} == HEADERS
    assert response.headers["content-security-policy"] == STRICT
    assert response.headers["cache-control"] == "no-store"


def test_what_has_an_etag_may_be_kept_and_is_asked_for_again(api):
    response = api.get("/docs/static/swagger-ui.css")
    assert response.headers["cache-control"] == "private, no-cache"
    again = api.get("/docs/static/swagger-ui.css", headers={"If-None-Match": response.headers["etag"]})
    assert again.status_code == 304


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_runs_its_own_scripts_and_no_others(api, path):
    response = api.get(path, headers={"accept": "text/html"})
    policy = response.headers["content-security-policy"]
    assert policy == page_policy(response.text)
    assert "unsafe" not in policy
    assert "sha256-" in policy
    assert not re.search(r"\son\w+=|\sstyle=", response.text)
    assert not re.search(r"""(src|href)=["'](?!/docs|data:)""", response.text)


def test_the_scripts_of_the_docs_are_here(api):
    for path in re.findall(r'(?:src|href)="([^"]+)"', api.get("/docs").text):
        assert api.get(path).status_code == 200


def test_no_page_asks_another_server_for_its_scripts(api):
    assert kind(api.get("/redoc")) == (401, "unauthorized")
    assert "http" not in re.sub(r"http-equiv", "", api.get("/docs").text)
