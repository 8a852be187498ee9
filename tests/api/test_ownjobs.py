import hashlib

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from jobs.results import finalise
from jobs.settings import Settings
from tests.sample_jobs import announce, do_chunk
from tests.support import kind

SECRETS = {"ann": "ls_of-ann", "bob": "ls_of-bob"}
UNKNOWN = "01M8259KQ6ZM43ZW7F9E4YQJWV"
CALLS = [
    ("GET", ""),
    ("GET", "/events"),
    ("GET", "/parts/0"),
    ("HEAD", "/parts/0"),
    ("GET", "/results"),
    ("GET", "/results?format=parquet"),
    ("HEAD", "/results"),
    ("POST", "/cancel"),
    ("POST", "/retry"),
    ("DELETE", ""),
]


class Caller:
    """A client with a key; several have one connection, since connections to the broker live in one event loop."""

    def __init__(self, client, name):
        self._client, self._key = client, {"authorization": f"Bearer {SECRETS[name]}"}

    def request(self, method, url, headers=(), **arguments):
        return self._client.request(method, url, headers=self._key | dict(headers), **arguments)

    def get(self, url, **arguments):
        return self.request("GET", url, **arguments)

    def post(self, url, **arguments):
        return self.request("POST", url, **arguments)


@pytest.fixture
def ann_and_bob(storage, storage_url, broker, redis):  # noqa: ARG001 - the storage has to be there
    """Two clients of one server, each with a key of its own."""
    announce(redis)
    entries = ",".join(f"{name}:{hashlib.sha256(secret.encode()).hexdigest()}" for name, secret in SECRETS.items())
    app = create_app(Settings(broker_url=broker.url, storage=storage_url, api_keys=entries))
    with TestClient(app) as client:
        yield Caller(client, "ann"), Caller(client, "bob")


def make(client, **headers):
    response = client.post("/jobs", json={"prompts": ["a fox"]}, headers=headers)
    assert response.status_code == 202
    return response.json()["id"]


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_another_keys_job_is_answered_as_one_that_does_not_exist(ann_and_bob, store, method, path):
    ann, bob = ann_and_bob
    job_id = make(ann)
    record = store.load(job_id)
    do_chunk(store, record, 0)
    assert finalise(store, job_id, read_all=False) == []
    theirs = bob.request(method, f"/jobs/{job_id}{path}")
    nobodys = bob.request(method, f"/jobs/{UNKNOWN}{path}")
    assert theirs.status_code == nobodys.status_code == 404
    assert theirs.text.replace(job_id, UNKNOWN) == nobodys.text
    if method != "HEAD":
        assert kind(theirs) == (404, "job-not-found")
    # What Bob did has changed nothing, and it is Ann's all the same.
    assert ann.get(f"/jobs/{job_id}").json()["status"] == "succeeded"
    assert ann.request(method, f"/jobs/{job_id}{path}").status_code in {200, 202, 204, 409}


def test_each_key_lists_its_own_jobs_only(ann_and_bob):
    ann, bob = ann_and_bob
    of_ann, of_bob = [], []
    for _ in range(3):
        of_ann.append(make(ann))
        of_bob.append(make(bob))
    for client, own in ((ann, of_ann), (bob, of_bob)):
        listed, after = [], None
        while True:
            page = client.get("/jobs", params={"limit": 2} | ({"after": after} if after else {})).json()
            listed += [job["id"] for job in page["jobs"]]
            after = page["next"]
            if after is None:
                break
            assert after in own
        assert listed == own[::-1]


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_the_same_idempotency_key_of_two_keys_makes_two_jobs(ann_and_bob):
    ann, bob = ann_and_bob
    headers = {"idempotency-key": "monday"}
    of_ann, of_bob = make(ann, **headers), make(bob, **headers)
    assert of_ann != of_bob
    assert (make(ann, **headers), make(bob, **headers)) == (of_ann, of_bob)


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_jobs_from_a_time_without_keys_are_nobodys_once_there_are_keys(ann_and_bob, api):
    ann, _ = ann_and_bob
    job_id = api.post("/jobs", json={"prompts": ["a fox"]}).json()["id"]
    assert kind(ann.get(f"/jobs/{job_id}")) == (404, "job-not-found")
    assert ann.get("/jobs").json()["jobs"] == []
    assert api.get(f"/jobs/{make(ann)}").status_code == 200
