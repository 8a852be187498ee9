"""POST /jobs with an `Idempotency-Key`: a create that is repeated makes nothing new."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.sample_jobs import announce
from tests.support import kind

KEY = {"idempotency-key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}


def create(api, headers=KEY, prompts=("a fox",)):
    return api.post("/jobs", json={"prompts": list(prompts)}, headers=headers)


def test_a_repeated_create_returns_the_first_job(api, store):
    first, again = create(api), create(api, prompts=["something", "else"])
    assert [response.status_code for response in (first, again)] == [202, 202]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    assert again.json() == first.json()
    assert list(store.newest()) == [first.json()["id"]]


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_other_keys_and_none_make_other_jobs(api):
    made = [create(api, headers) for headers in (KEY, {"idempotency-key": "other"}, {}, {})]
    assert len({response.json()["id"] for response in made}) == 4
    assert not any("idempotency-replayed" in response.headers for response in made)


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_a_repeated_create_needs_neither_the_broker_nor_a_body_that_is_right(api, broker):
    first = create(api).json()
    broker.process.terminate()
    broker.process.wait()
    for arguments in ({"content": b"rubbish"}, {"files": {"file": ("a.png", b"")}}):
        again = api.post("/jobs", headers=KEY, **arguments)
        assert (again.status_code, again.json()["id"]) == (202, first["id"])


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_a_create_that_was_refused_does_not_count(api):
    assert kind(api.post("/jobs", json={"prompts": []}, headers=KEY)) == (422, "invalid-request")
    assert "idempotency-replayed" not in create(api).headers


def test_once_its_job_is_deleted_a_key_makes_a_new_one(api):
    first = create(api).json()["id"]
    api.delete(f"/jobs/{first}")
    again = create(api)
    assert again.json()["id"] != first
    assert "idempotency-replayed" not in again.headers
    assert create(api).json()["id"] == again.json()["id"]


def test_of_creates_at_the_same_time_one_makes_a_job(api, store):
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: create(api), range(4)))
    assert {response.status_code for response in made} == {202}
    assert {response.json()["id"] for response in made} == set(store.newest())
    assert len(list(store.newest())) == 1
    assert sum("idempotency-replayed" not in response.headers for response in made) == 1


def test_a_create_that_another_overtakes_says_whose_job_it_returns(lone_api, broker, redis):
    announce(redis)
    with httpx.Client(base_url=lone_api(broker.url), headers=KEY) as slow:
        faster = []

        def body():
            yield b"slow\n"
            faster.append(httpx.post(f"{slow.base_url}/jobs", json={"prompts": ["fast"]}, headers=KEY))
            yield b"slower\n"

        overtaken = slow.post("/jobs", content=body(), headers={"content-type": "text/plain"})
        accepted = httpx.get(f"{slow.base_url}/metrics").text
    assert overtaken.json()["id"] == faster[0].json()["id"]
    assert "idempotency-replayed" not in faster[0].headers
    assert overtaken.headers["idempotency-replayed"] == "true"
    assert "layerstack_jobs_accepted_total 1.0" in accepted


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "\x7f", "ä"])
def test_a_key_that_is_none_is_refused_by_name(api, store, key):
    for arguments in ({"json": {"prompts": ["a"]}}, {"content": b"a"}):
        response = api.post("/jobs", headers={"idempotency-key": key.encode("latin-1")}, **arguments)
        assert kind(response) == (422, "invalid-request")
        assert (response.json()["field"], response.json()["limit"]) == ("Idempotency-Key", 255)
    assert list(store.newest()) == []


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
@pytest.mark.parametrize("key", ["x", "~" * 255, '"8e03978e"'])
def test_a_key_is_any_visible_ascii(api, key):
    first = create(api, {"idempotency-key": key})
    assert create(api, {"idempotency-key": key}).json()["id"] == first.json()["id"]
