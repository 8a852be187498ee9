import socket

import pytest

from tests.support import free_port, status_of, wait_for

ANY = "0.0.0.0"  # noqa: S104 - that it is refused is what is tested
KEYS = {"api_keys": "ann:" + "0" * 64}


def test_without_keys_it_does_not_listen_where_others_reach_it(spawn, broker):
    process = spawn("api", port=free_port(), host=ANY, broker_url=broker.url)
    assert process.wait(30) == 1
    said = process.log.read_text()
    for name in (f"LAYERSTACK_HOST='{ANY}'", "LAYERSTACK_API_KEYS", "LAYERSTACK_ALLOW_WITHOUT_KEYS"):
        assert name in said


@pytest.mark.parametrize(("settings", "warns"), [(KEYS, False), ({"allow_without_keys": "true"}, True)])
def test_with_keys_or_on_purpose_it_does(spawn, broker, tmp_path, settings, warns):
    port = free_port()
    process = spawn("api", port=port, host=ANY, broker_url=broker.url, storage=tmp_path / "storage", **settings)
    wait_for(lambda: status_of(f"http://127.0.0.1:{port}/health") == 200, process, process.log)
    assert ("without keys" in process.log.read_text()) == warns


@pytest.mark.parametrize(
    ("setting", "value"), [("rate_limit", "600/fortnight"), ("cors_origins", "https://page.example/")]
)
def test_a_value_that_only_the_api_can_judge_is_named(spawn, setting, value):
    process = spawn("api", port=free_port(), **{setting: value})
    assert process.wait(30) == 1
    assert f"LAYERSTACK_{setting.upper()}='{value}'" in process.log.read_text()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 200_000,
        b"GET /health HTTP/1.1\r\nX: " + b"y" * 2**20,
        b"GET /health?" + b"y" * 2**20,
        b"POST /jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"y" * 2**20,
    ],
    ids=["many headers", "a long one", "a long query", "a trailer"],
)
def test_what_is_around_a_body_has_a_limit(lone_api, broker, head):
    url = lone_api(broker.url)
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection:
        try:
            connection.sendall(head)
            while connection.recv(2**16):  # an endless head has no answer, but for a refusal; then it is closed
                pass
        except (ConnectionResetError, BrokenPipeError):
            pass
