import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from api import joblist
from jobs import keys
from jobs.results import finalise
from tests.sample_jobs import do_chunk, make_job
from tests.support import kind


@pytest.fixture
def jobs(store, redis):
    """A job in each of five states, by it; the newest is last."""
    _, running, succeeded, cancelled, paused = made = [make_job(store, count=4) for _ in range(5)]
    redis.hset(keys.progress(running.id), "0", 1)
    do_chunk(store, succeeded, 0)
    assert finalise(store, succeeded.id, read_all=False) == []
    store.cancel(cancelled.id)
    redis.set(keys.trouble(paused.id), "the storage is full")
    return dict(zip(("queued", "running", "succeeded", "cancelled", "paused"), (job.id for job in made), strict=True))


def listed(api, **params):
    page = api.get("/jobs", params=params).json()
    return [job["id"] for job in page["jobs"]], page["next"]


def test_jobs_of_one_state_or_of_several_are_listed(api, jobs):
    for status, job_id in jobs.items():
        assert listed(api, status=status) == ([job_id], None)
    assert listed(api, status=["running", "queued", "paused"]) == (
        [jobs["paused"], jobs["running"], jobs["queued"]],
        None,
    )
    assert listed(api, status="expired") == ([], None)


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_pages_of_a_filter_are_all_there_is(api, store, jobs):
    others = [make_job(store, count=4).id for _ in range(4)]
    want, found, after = [*others[::-1], jobs["queued"]], [], None
    for _ in range(3):
        page, after = listed(api, status="queued", limit=2, **({"after": after} if after else {}))
        found += page
    assert (found, after) == (want, None)


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_a_page_costs_a_bounded_number_of_looks(api, jobs, monkeypatch):
    monkeypatch.setattr(joblist, "MAX_LOOKS", 2)
    monkeypatch.setattr(joblist, "_LOOKS_AT_ONCE", 1)
    newest_first = list(jobs.values())[::-1]
    assert listed(api, status="queued") == ([], newest_first[1])
    assert listed(api, status="queued", after=newest_first[1]) == ([], newest_first[3])
    assert listed(api, status="queued", after=newest_first[3]) == ([jobs["queued"]], None)


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 6])
def test_pages_of_any_size_show_each_job_once(api, jobs, limit):
    found, after = [], None
    while True:
        page, after = listed(api, limit=limit, **({"after": after} if after else {}))
        found += page
        if after is None:
            break
        assert len(page) == limit
    assert found == list(jobs.values())[::-1]


@pytest.mark.usefixtures("jobs")
@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_a_list_has_no_parts(api):
    [job] = api.get("/jobs", params={"status": "succeeded"}).json()["jobs"]
    assert (job["num_parts_done"], job["num_succeeded"], job["parts"]) == (1, 4, [])


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
@pytest.mark.parametrize(
    ("params", "field"), [({"status": "sleeping"}, "status"), ({"limit": 0}, "limit"), ({"limit": 101}, "limit")]
)
def test_a_bad_parameter_is_named(api, params, field):
    response = api.get("/jobs", params=params)
    assert kind(response) == (422, "invalid-request")
    assert field in response.json()["field"]


def test_many_lists_at_once_take_no_more_threads_than_one(api, jobs):  # noqa: ARG001 - some have to be there
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda _: listed(api), range(200)))
    names = [thread.name for thread in threading.enumerate()]
    # 10 for lists, and 40 for all else
    assert sum(name.startswith("AnyIO worker thread") for name in names) <= 50
