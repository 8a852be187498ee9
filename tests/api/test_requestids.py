import pytest
from fastapi.testclient import TestClient
from ulid import ULID

from api.app import create_app
from jobs.settings import Settings


@pytest.fixture
def api(broker, tmp_path):
    """The API without a worker, with a route that fails."""
    app = create_app(Settings(broker_url=broker.url, storage=str(tmp_path), rate_limit="1/hour", cors_origins="*"))

    @app.get("/docs/broken")
    def broken() -> None:
        raise RuntimeError("a fault of ours")

    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("given", ["a", "req_01.X-9", "A" * 128])
def test_an_id_of_the_caller_comes_back(api, given):
    assert api.get("/health", headers={"X-Request-ID": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "a b", "A" * 129, "a\tb", "é".encode("latin-1"), "<script>", "a,b"])
def test_without_a_good_one_it_is_made(api, given):
    made = api.get("/health", headers={} if given is None else {"X-Request-ID": given}).headers["x-request-id"]
    assert str(ULID.from_str(made)) == made


def test_every_answer_has_one(api):
    api.get("/jobs")
    answers = [
        (api.get("/jobs"), 429),
        (api.get("/health", headers={"Host": "other.example"}), 421),
        (api.post("/jobs", headers={"Sec-Fetch-Site": "cross-site"}), 202),
        (api.options("/jobs", headers={"Origin": "https://a.example", "Access-Control-Request-Method": "GET"}), 200),
        (api.get("/docs/broken"), 500),
    ]
    ids = {response.headers["x-request-id"] for response, _ in answers}
    assert len(ids) == len(answers)


def test_a_failure_of_the_server_has_it_in_the_document_for_people_to_quote(api):
    response = api.get("/docs/broken", headers={"X-Request-ID": "mine"})
    assert response.status_code == 500
    assert response.json()["request_id"] == response.headers["x-request-id"] == "mine"
    assert api.get("/ready", headers={"X-Request-ID": "mine"}).json()["request_id"] == "mine"


def test_a_fault_of_the_caller_has_it_in_the_header_alone(api):
    response = api.get("/docs/nowhere", headers={"X-Request-ID": "mine"})
    assert response.status_code == 404
    assert "request_id" not in response.json()
