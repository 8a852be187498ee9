import inspect
from itertools import pairwise

import anyio
import numpy as np
import pytest

import layerstack
from jobs.records import JobStatus
from layerstack import asyncclient, client
from layerstack.errors import ServerError


@pytest.fixture
def connected(stack):
    with layerstack.Client(stack.url) as found:
        yield found


@pytest.fixture
def job(connected):
    """A finished job of five prompts in three parts."""
    made = connected.jobs.submit([f"prompt {n}" for n in range(5)], {"chunk_rows": 2})
    made.wait(timeout_s=60)
    return made


def public(kind):
    """The methods of a class and their parameters; a client is closed by `close`, an async one by `aclose`."""
    methods = [(name.removeprefix("a"), each) for name, each in inspect.getmembers(kind) if not name.startswith("_")]
    return {
        name: [(p.name, p.kind, p.annotation) for p in inspect.signature(method).parameters.values()]
        for name, method in methods
        if inspect.isfunction(method)
    }


@pytest.mark.parametrize("name", ["Client", "Jobs", "Job"])
def test_code_that_is_not_async_has_the_same_methods_with_the_same_arguments(name):
    assert public(getattr(client, name)) == public(getattr(asyncclient, f"Async{name}"))


def test_a_fetched_job_reads_like_the_servers_own(job, stack, tmp_path):
    assert job.download(tmp_path).rows == 5
    got, own = layerstack.read(tmp_path), layerstack.read(stack.storage / "jobs" / job.id)
    for a, b in zip(got, own, strict=True):
        assert a["id"] == b["id"]
        assert (a["prompt_embeds"] == b["prompt_embeds"]).all()


def test_a_finished_job_can_be_checked_again_but_not_cancelled_and_be_deleted(connected, job):
    with pytest.raises(ServerError, match="is succeeded and cannot be cancelled") as caught:
        job.cancel()
    assert caught.value.status == 409
    assert job.retry().status == JobStatus.RUNNING
    assert job.wait(timeout_s=60).status == JobStatus.SUCCEEDED
    job.delete()
    with pytest.raises(ServerError, match=f"no job '{job.id}'"):
        connected.jobs.get(job.id)


def test_jobs_are_listed_newest_first_by_status_and_over_pages(connected, job):
    others = [connected.jobs.submit([f"{n}"]) for n in range(3)]
    for other in others:
        other.wait(timeout_s=60)
    wanted = [made.id for made in reversed(others)]
    assert [view.id for view in connected.jobs.list(limit=3)] == wanted
    assert [view.id for view in connected.jobs.list(limit=3, status=[JobStatus.SUCCEEDED])] == wanted
    assert connected.jobs.list(limit=5, status=["failed"]) == []
    older = connected.jobs.list(limit=1000, after=wanted[0])
    assert [view.id for view in older][:3] == [*wanted[1:], job.id]
    assert all(newer.id > older.id for newer, older in pairwise(older))


def test_a_job_shows_itself(job):
    assert repr(job) == f"<Job {job.id} succeeded>"
    assert (job.refresh().num_done, job.status) == (5, JobStatus.SUCCEEDED)


def test_a_client_needs_no_with_and_may_be_closed_twice(stack):
    found = layerstack.Client(stack.url + "/")
    assert (found.url, found.encoder().max_length) == (stack.url, 512)
    found.close()
    found.close()


def test_the_url_comes_from_the_environment(stack, monkeypatch):
    monkeypatch.setenv("LAYERSTACK_URL", stack.url)
    with layerstack.Client() as found:
        assert found.encoder().embed_dim == 96


def test_a_key_is_sent_that_is_given_or_in_the_environment(keyed_url, monkeypatch):
    monkeypatch.setenv("LAYERSTACK_API_KEY", "ls_of-ann\n")
    for given in ({}, {"api_key": "ls_of-ann"}):
        with layerstack.Client(keyed_url, **given) as found:
            assert found.jobs.list() == []
    with layerstack.Client(keyed_url, api_key="ls_of-eve") as found, pytest.raises(ServerError) as caught:
        found.jobs.list()
    assert caught.value.status == 401


def test_async_code_gets_the_same_rows(stack, connected):
    async def ask():
        async with layerstack.AsyncClient(stack.url) as found:
            return await found.predict(["a fox"]), (await found.encoder()).fingerprint

    answer, fingerprint = anyio.run(ask)
    np.testing.assert_allclose(answer.prompt_embeds, connected.predict("a fox").prompt_embeds, rtol=1e-4, atol=1e-4)
    assert fingerprint == answer.fingerprint
