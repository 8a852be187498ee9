import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from jobs.errors import SettingsError
from jobs.settings import Settings
from tests.sample_jobs import announce
from tests.support import kind

PAGE, OTHER = "https://page.example", "https://other.example"
SELF = "http://127.0.0.1"
BODY = {"prompts": ["a fox"]}


@pytest.fixture
def open_api(broker, redis, tmp_path):
    """Open the API with settings, as a client on this machine reaches it."""
    announce(redis)
    opened = []

    def start(**settings):
        client = TestClient(
            create_app(Settings(broker_url=broker.url, storage=str(tmp_path), **settings)), base_url=SELF
        )
        opened.append(client)
        return client.__enter__()

    yield start
    for client in opened:
        client.__exit__(None, None, None)


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Origin": SELF},
        {"Origin": OTHER},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:8000"},
        {"Origin": "http://["},
    ],
)
def test_a_page_of_another_origin_changes_nothing_on_a_server_without_keys(open_api, headers):
    api = open_api()
    for response in (api.post("/jobs", json=BODY, headers=headers), api.delete("/jobs/nonsense", headers=headers)):
        assert kind(response) == (403, "cross-origin")
    assert api.get("/jobs", headers=headers).json()["jobs"] == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Sec-Fetch-Site": "same-origin", "Origin": SELF},
        {"Sec-Fetch-Site": "none"},
        {"Origin": SELF},
        {"Origin": PAGE, "Sec-Fetch-Site": "cross-site"},
    ],
)
def test_programs_our_own_pages_and_named_origins_may_change_things(open_api, headers):
    assert open_api(cors_origins=PAGE).post("/jobs", json=BODY, headers=headers).status_code == 202


def test_with_keys_it_is_the_key_that_counts(open_api):
    api = open_api(api_keys="ann:" + "0" * 64)
    assert kind(api.post("/jobs", json=BODY, headers={"Origin": OTHER})) == (401, "unauthorized")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:7860", "127.0.0.1:7860", "127.1.2.3", "[::1]", "[::1]:7860"])
def test_without_keys_it_answers_to_names_of_this_machine(open_api, host):
    assert open_api().get("/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example:7860", "127.0.0.1.evil.example", "10.0.0.1", "[", "", "127.0.0.1@evil"])
def test_without_keys_it_answers_to_no_other_name(open_api, host):
    for path in ("/jobs", "/health", "/"):
        response = open_api().get(path, headers={"Host": host})
        assert kind(response) == (421, "host-not-allowed")
        assert "LAYERSTACK_API_KEYS" in response.json()["detail"]


def test_without_keys_it_answers_to_names_that_are_allowed(open_api):
    api = open_api(host="0.0.0.0", published_on="127.0.0.1", allowed_hosts="api,Gateway")  # noqa: S104 - nothing listens
    for host in ("api:7860", "gateway", "127.0.0.1"):
        assert api.get("/health", headers={"Host": host}).status_code == 200
    assert kind(api.get("/health", headers={"Host": "evil.example"})) == (421, "host-not-allowed")


@pytest.mark.parametrize("settings", [{"api_keys": "ann:" + "0" * 64}, {"allow_without_keys": True}])
def test_with_keys_or_if_none_are_wanted_it_answers_to_any_name(open_api, settings):
    assert open_api(**settings).get("/health", headers={"Host": "gpu.example"}).status_code == 200


def test_cors_is_off_unless_origins_are_named(open_api):
    api = open_api()
    response = api.get("/jobs", headers={"Origin": OTHER})
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("access-control")]
    preflight = api.options("/jobs", headers={"Origin": OTHER, "Access-Control-Request-Method": "POST"})
    assert kind(preflight) == (405, "method-not-allowed")


def test_a_named_origin_reads_every_answer_errors_included(open_api):
    api = open_api(cors_origins=PAGE, api_keys="ann:" + "0" * 64, body_max_bytes=10)
    for response in (api.get("/health", headers={"Origin": PAGE}), api.get("/jobs", headers={"Origin": PAGE})):
        assert response.headers["access-control-allow-origin"] == PAGE
        assert "Origin" in response.headers["vary"]
        exposed = response.headers["access-control-expose-headers"]
        assert {
            *("Location", "ETag", "Retry-After", "X-Request-ID", "Content-Range", "Content-Disposition"),
            *("Idempotency-Replayed", "Repr-Digest", "Layerstack-Encode-Ms", "Layerstack-Queue-Ms"),
        } <= set(exposed.split(", "))


def test_a_preflight_needs_no_key(open_api):
    api = open_api(cors_origins=PAGE, api_keys="ann:" + "0" * 64)
    names = "authorization,content-encoding,content-type,idempotency-key,if-match,if-range,range"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": names}
    preflight = api.options("/jobs", headers={"Origin": PAGE} | asked)
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, PAGE)
    refused = api.options("/jobs", headers={"Origin": OTHER} | asked)
    assert kind(refused) == (403, "cross-origin")
    assert "access-control-allow-origin" not in refused.headers


def test_a_star_lets_pages_of_all_origins_call(open_api):
    api = open_api(cors_origins="*")
    response = api.post("/jobs", json=BODY, headers={"Origin": OTHER, "Sec-Fetch-Site": "cross-site"})
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (202, "*")


@pytest.mark.parametrize("origin", ["page.example", "https://page.example/", "https://page.example/path"])
def test_what_is_no_origin_is_named(open_api, origin):
    with pytest.raises(SettingsError, match=f"LAYERSTACK_CORS_ORIGINS='{origin}'"):
        open_api(cors_origins=origin)
