import json

import anyio
import httpx
import pytest

import layerstack
from jobs.records import JobStatus
from layerstack.errors import JobEndedError, ServerError, ServerUnreachableError
from tests.layerstack.servers import Answer, answering, in_turn, problem

SSE = {"Content-Type": "text/event-stream"}


@pytest.fixture
def client(stack):
    with layerstack.Client(stack.url) as found:
        yield found


@pytest.fixture
def view(client):
    """A job as its server shows it."""
    job = client.jobs.submit(["a"])
    return job.wait(timeout_s=60).model_dump(mode="json", exclude={"parts", "parts_next"})


def stream(*events, stop=None):
    """Server-sent events: name, content and id of each."""
    text = "".join(f"id: {id_}\nevent: {name}\ndata: {json.dumps(content)}\n\n" for name, content, id_ in events)
    return Answer(200, text.encode() + b": ping\n\n" * 3, SSE, stop=None if stop is None else len(text.encode()))


def test_events_tell_of_every_part_once_and_end(client):
    job = client.jobs.submit([f"prompt {n}" for n in range(50)], {"chunk_rows": 10})
    events = list(job.events())
    assert sorted(event.part.index for event in events if event.kind == "part") == list(range(5))
    assert events[0].kind == "progress"
    assert (events[-1].kind, events[-1].job.status) == ("end", JobStatus.SUCCEEDED)


def test_a_lost_connection_goes_on_after_the_last_event(view, monkeypatch):
    monkeypatch.setattr("layerstack.transport._SHORTEST_WAIT_S", 0.001)
    running = view | {"status": "running"}
    answers = in_turn(
        stream(
            ("progress", running, ";running"),
            ("part", {"index": 0, "rows": 1, "bytes": 1, "url": "/"}, "0;running"),
            stop=1,
        ),
        None,
        problem(503, "storage-unavailable"),
        stream(("news", {}, "0;running"), ("end", view, "0;succeeded")),
    )
    with answering(answers) as server, layerstack.Client(server.url) as client:
        assert [event.kind for event in client.jobs.events(view["id"])] == ["progress", "part", "end"]
        assert [request.headers.get("Last-Event-ID") for request in server.seen] == [None] + ["0;running"] * 3


def test_a_server_that_stays_away_is_told(view, monkeypatch):
    monkeypatch.setattr("layerstack.transport._SHORTEST_WAIT_S", 0.01)
    first = stream(("progress", view | {"status": "running"}, ";running"), stop=1)
    with (
        answering(in_turn(first, None)) as server,
        layerstack.Client(server.url) as client,
        pytest.raises(ServerUnreachableError),
    ):
        list(client.jobs.events(view["id"], patience_s=0.2))


def test_a_server_that_is_busy_at_first_is_asked_again(view):
    answers = in_turn(problem(429, "rate-limited", retry_after=0), stream(("end", view, ";succeeded")))
    with answering(answers) as server, layerstack.Client(server.url) as client:
        assert [event.kind for event in client.jobs.events(view["id"])] == ["end"]


def test_a_client_that_is_closed_ends_its_streams(client):
    other = layerstack.Client(client.url)
    events = other.jobs.events(other.jobs.submit(["a"]).id)
    next(events)
    other.close()
    events.close()
    with pytest.raises(RuntimeError, match="this Client is closed"):
        other.encoder()


def test_a_job_that_there_is_not_is_told_at_once(client):
    with pytest.raises(ServerError, match="no job 'nope'"):
        list(client.jobs.events("nope"))


def test_waiting_returns_the_job_and_shows_each_change(client):
    shown = []
    job = client.jobs.submit(["a", "b"])
    assert job.wait(progress=shown.append, timeout_s=60).status == job.status == JobStatus.SUCCEEDED
    assert [shown[0].id, shown[-1].status] == [job.id, JobStatus.SUCCEEDED]


def test_waiting_for_longer_than_said_is_a_timeout_and_the_job_goes_on(client):
    job = client.jobs.submit([f"prompt number {n}" for n in range(3000)], {"chunk_rows": 100})
    with pytest.raises(TimeoutError):
        job.wait(timeout_s=0.3)
    assert job.cancel().status in {JobStatus.CANCELLING, JobStatus.CANCELLED}
    with pytest.raises(JobEndedError, match=f"job {job.id} is cancelled") as caught:
        job.wait(timeout_s=60)
    assert caught.value.job.status == JobStatus.CANCELLED
    job.delete()


def test_a_job_that_is_deleted_meanwhile_ends_the_wait(client, stack):
    job = client.jobs.submit([f"prompt number {n}" for n in range(3000)], {"chunk_rows": 100})
    deleted = []

    def delete(_):
        if not deleted:
            deleted.append(httpx.delete(f"{stack.url}/jobs/{job.id}").status_code)

    with pytest.raises(JobEndedError, match="has been deleted") as caught:
        job.wait(progress=delete)
    assert (deleted, caught.value.job) == ([204], None)


def test_a_job_that_failed_says_why(view):
    ended = view | {"status": "failed", "error": "chunk 0: it burns"}
    with (
        answering(in_turn(stream(("end", ended, ";failed")))) as server,
        layerstack.Client(server.url) as client,
        pytest.raises(JobEndedError, match="is failed: chunk 0: it burns"),
    ):
        client.jobs.wait(view["id"])


def test_async_code_has_the_same(stack):
    async def use():
        async with layerstack.AsyncClient(stack.url) as client:
            job = await client.jobs.submit(["a", "b"])
            kinds = [event.kind async for event in job.events()]
            return kinds, (await job.wait()).status

    kinds, status = anyio.run(use)
    assert (kinds[-1], status) == ("end", JobStatus.SUCCEEDED)
