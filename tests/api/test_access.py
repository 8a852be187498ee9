import hashlib
import hmac
import socket

import httpx
import pytest
from fastapi.testclient import TestClient

from api.access import OwnerDep
from api.app import create_app
from jobs.settings import Settings
from tests.sample_jobs import announce
from tests.support import kind

KEYS = {"ann": "ls_of-ann", "bob": "ls_of-bob"}
ENTRIES = ",".join(f"{name}:{hashlib.sha256(key.encode()).hexdigest()}" for name, key in KEYS.items())
OPEN = ["/", "/health", "/ready", "/docs", "/docs/static/swagger-ui.css", "/openapi.json"]
CLOSED = [
    ("GET", "/jobs"),
    ("POST", "/jobs"),
    ("POST", "/predict"),
    ("GET", "/encoder"),
    ("GET", "/metrics"),
    ("GET", "/nowhere"),
    ("GET", "/health/"),
    ("POST", "/"),
    ("DELETE", "/docs"),
    ("OPTIONS", "/jobs"),
]
WRONG = [
    "Bearer ls_of-eve",
    "Bearer ls_of-ann-and-more",
    "Bearer ",
    "Bearer",
    "ls_of-ann",
    "Basic ls_of-ann",
    "Bearer é".encode("latin-1"),
    "Bearer " + hashlib.sha256(b"ls_of-ann").hexdigest(),
]


def bearer(name):
    return {"Authorization": f"Bearer {KEYS[name]}"}


@pytest.fixture
def app(broker, redis, tmp_path):
    """The API with two keys, and a route that tells whose call it is."""
    announce(redis)
    made = create_app(Settings(broker_url=broker.url, storage=str(tmp_path), api_keys=ENTRIES))

    @made.get("/whose")
    def whose(owner: OwnerDep) -> str | None:
        return owner

    return made


@pytest.fixture
def api(app):
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


@pytest.mark.parametrize("name", KEYS)
def test_a_call_with_a_key_belongs_to_its_name(api, name):
    assert api.get("/whose", headers=bearer(name)).json() == name
    assert api.get("/whose", headers={"Authorization": f"bEARER   {KEYS[name]}"}).json() == name


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_a_call_without_a_key_is_401(api, method, path):
    response = api.request(method, path)
    assert kind(response) == (401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["field"] == "Authorization"


@pytest.mark.parametrize("header", WRONG)
def test_a_wrong_key_looks_like_none_but_for_the_detail_and_is_not_shown(api, header, caplog):
    wrong, missing = api.get("/jobs", headers={"Authorization": header}), api.get("/jobs")
    assert kind(wrong) == kind(missing) == (401, "unauthorized")
    ours = {"x-request-id", "content-length"}
    assert [pair for pair in wrong.headers.items() if pair[0] not in ours] == [
        pair for pair in missing.headers.items() if pair[0] not in ours
    ]
    assert wrong.json() | {"detail": ""} == missing.json() | {"detail": ""}
    assert "ls_of" not in wrong.text + str(wrong.headers) + caplog.text


@pytest.mark.parametrize("path", OPEN)
def test_what_tells_nothing_of_jobs_is_open(api, path):
    for headers in ({}, {"Authorization": "Bearer ls_of-eve"}):
        response = api.get(path, headers=headers)
        assert response.status_code == 200
        assert api.head(path, headers=headers).status_code in {200, 405}


@pytest.mark.parametrize("header", [None, *WRONG, *(f"Bearer {key}" for key in KEYS.values())])
def test_each_call_is_compared_with_each_key(api, header, monkeypatch):
    compared = []
    real = hmac.compare_digest

    def watched(known, presented):
        compared.append(known)
        return real(known, presented)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    api.get("/jobs", headers={} if header is None else {"Authorization": header})
    assert compared == [hashlib.sha256(key.encode()).hexdigest() for key in KEYS.values()]


def test_the_digest_of_nothing_among_the_keys_lets_nobody_in_without_one(broker, tmp_path):
    nothing = f"careless:{hashlib.sha256().hexdigest()}"
    settings = Settings(broker_url=broker.url, storage=str(tmp_path), api_keys=nothing)
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as api:
        for headers in ({}, {"Authorization": "Bearer "}):
            assert kind(api.get("/jobs", headers=headers)) == (401, "unauthorized")


def test_without_keys_an_authorization_header_is_ignored(broker, redis, tmp_path):
    announce(redis)
    settings = Settings(broker_url=broker.url, storage=str(tmp_path))
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as api:
        assert api.get("/jobs", headers={"Authorization": "Bearer hf_anything"}).status_code == 200
        assert "security" not in api.get("/openapi.json").text


def test_a_wrong_key_is_refused_before_the_body_arrives(lone_api, broker):
    url = httpx.URL(lone_api(broker.url, api_keys=ENTRIES))
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        head = (
            f"POST /jobs HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: text/plain\r\nContent-Length: 1000000000\r\n\r\n"
        )
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")


def test_the_interface_says_which_calls_need_a_key(api):
    document = api.get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation.get("security", []) == ([] if path in {"/", "/health", "/ready"} else [{"key": []}])
