import hashlib
import signal
import time

import pytest
from fastapi.testclient import TestClient
from limits import RateLimitItemPerMinute, RateLimitItemPerSecond

from api.app import create_app
from api.ratelimit import parse_limits
from jobs import keys
from jobs.errors import SettingsError
from jobs.settings import Settings
from tests.sample_jobs import announce
from tests.support import kind, wait_for

KEYS = ",".join(f"{name}:{hashlib.sha256(name.encode()).hexdigest()}" for name in ("ann", "bob"))


@pytest.fixture
def open_api(broker, redis, tmp_path):
    """Open the API with settings; several of them share the broker."""
    announce(redis)
    opened = []

    def start(**settings):
        client = TestClient(
            create_app(Settings(broker_url=broker.url, storage=str(tmp_path), **settings)),
            base_url="http://127.0.0.1",
        )
        opened.append(client)
        return client.__enter__()

    yield start
    for client in opened:
        client.__exit__(None, None, None)


def bearer(name):
    return {"Authorization": f"Bearer {name}"}


def test_limits_are_read_the_shortest_window_first():
    assert parse_limits("600/minute; 20 per second") == [RateLimitItemPerSecond(20), RateLimitItemPerMinute(600)]
    assert parse_limits(None) == []


@pytest.mark.parametrize("text", ["many", "600", "600/fortnight", "0/minute", "600/minute;", "-1/second"])
def test_what_is_no_limit_is_named_at_the_start(tmp_path, text):
    with pytest.raises(SettingsError, match=f"LAYERSTACK_RATE_LIMIT='{text}'"):
        create_app(Settings(storage=str(tmp_path), rate_limit=text))


def test_each_key_has_its_own_calls_in_all_processes_of_a_broker(open_api):
    first, second = (open_api(api_keys=KEYS, rate_limit="3/hour") for _ in range(2))
    for api in (first, second, first):
        assert api.get("/jobs", headers=bearer("ann")).status_code == 200
    for api in (first, second):
        assert kind(api.get("/jobs", headers=bearer("ann"))) == (429, "rate-limited")
    assert second.get("/jobs", headers=bearer("bob")).status_code == 200


def test_a_refusal_says_what_the_limit_is_and_when_to_come_again(open_api):
    api = open_api(rate_limit="2/hour;100/day")
    left = [api.get("/jobs").headers["ratelimit-remaining"] for _ in range(2)]
    assert left == ["1", "0"]
    response = api.post("/jobs", content=b"not read", headers={"Content-Type": "text/nonsense"})
    assert kind(response) == (429, "rate-limited")
    assert (response.json()["limit"], response.json()["window_s"]) == (2, 3600)
    assert response.headers["ratelimit-limit"] == "2"
    assert response.headers["ratelimit-remaining"] == "0"
    assert 3590 <= int(response.headers["retry-after"]) == int(response.headers["ratelimit-reset"]) <= 3600


def test_after_the_time_that_it_names_there_is_a_call(open_api):
    api = open_api(rate_limit="1/second")
    wait_for(lambda: (refused := api.get("/jobs")).status_code == 429 and refused.headers["retry-after"] == "1")
    refused = time.monotonic()
    wait_for(lambda: api.get("/jobs").status_code == 200)
    assert time.monotonic() - refused < 1.5


def test_a_call_that_the_shorter_limit_refuses_is_not_counted_in_the_longer_one(open_api):
    api = open_api(rate_limit="1/second;3/hour")
    accepted = 0

    def three():
        nonlocal accepted
        accepted += api.get("/jobs").status_code == 200
        return accepted == 3

    wait_for(three)  # many are refused in between


def test_what_tells_nothing_of_jobs_and_what_has_no_key_are_not_counted(open_api):
    api = open_api(api_keys=KEYS, rate_limit="1/hour")
    for path in ("/health", "/ready", "/", "/docs", "/openapi.json"):
        for _ in range(2):
            response = api.get(path)
            assert response.status_code == 200
            assert "ratelimit-limit" not in response.headers
    for _ in range(2):
        assert kind(api.get("/jobs", headers=bearer("eve"))) == (401, "unauthorized")
    assert api.get("/jobs", headers=bearer("ann")).status_code == 200


def test_without_keys_all_callers_share_the_calls(open_api):
    api = open_api(rate_limit="1/hour")
    assert api.get("/jobs", headers=bearer("ann")).status_code == 200
    assert kind(api.get("/jobs", headers=bearer("bob"))) == (429, "rate-limited")


def test_its_counters_have_names_of_ours_and_expire(open_api, redis):
    open_api(rate_limit="1/minute").get("/jobs")
    [counter] = redis.keys(f"{keys.RATE_LIMIT}:*".encode()) + redis.keys("LIMIT*")
    assert 0 < redis.ttl(counter) <= 120


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["gone", "hanging"])
def test_without_the_broker_nothing_is_refused(open_api, broker, number):
    api = open_api(rate_limit="1/hour", predict_timeout_s=1)
    assert api.get("/jobs").status_code == 200
    broker.process.send_signal(number)
    if number == signal.SIGKILL:
        broker.process.wait()
    started = time.monotonic()
    assert api.get("/nowhere").status_code == 404  # asks the broker for nothing else
    assert time.monotonic() - started < 2
    broker.process.send_signal(signal.SIGCONT)
    if number == signal.SIGSTOP:
        assert kind(api.get("/jobs")) == (429, "rate-limited")
