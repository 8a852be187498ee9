import json
import signal
import threading
from itertools import pairwise

import anyio
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.events import Seen, job_events
from api.jobviews import Look
from api.problems import Problem
from jobs import keys
from jobs.errors import StorageError
from jobs.layout import job_names
from jobs.progress import Live
from jobs.records import JobStatus
from jobs.results import finalise
from jobs.storage import open_storage
from jobs.store import JobStore
from tests.sample_jobs import announce, do_chunk, make_job
from tests.support import free_port, kind, status_of, wait_for

UNKNOWN = "01M8259KQ6ZM43ZW7F9E4YQJWV"


# What a client has seen.


@given(st.lists(st.integers(0, 60), unique=True))
def test_the_id_of_an_event_says_exactly_which_parts_were_seen(parts):
    seen = Seen()
    for part in parts:
        assert part not in seen
        seen.add(part)
    seen.status = JobStatus.RUNNING
    read = Seen.parse(str(seen))
    assert [part for part in range(70) if part in read] == sorted(parts)
    assert (str(read), read.status) == (str(seen), "running")
    assert str(seen).count(",") == max(0, sum(after > before + 1 for before, after in pairwise(sorted(parts))))


@pytest.mark.parametrize("header", ["0-119,123;running", "5;", ";queued", ";", "0;succeeded"])
def test_an_id_of_ours_is_read_as_it_was_written(header):
    assert str(Seen.parse(header)) == header


@pytest.mark.parametrize("header", [None, ""])
def test_without_an_id_nothing_has_been_seen(header):
    assert str(Seen.parse(header)) == ";"


@pytest.mark.parametrize(
    "header",
    [
        *(
            "x",
            "0-1",
            "1-0;running",
            "3,1;running",
            "0-5,3-9;",
            "0-1,2;",
            "1,1;",
            "-1;",
            "1-;",
            ",1;",
            "1,;",
            "1;sleeping",
        ),
        *("1;running;", "1;Running", "9999999999;", "²;", " 1;", "1,,2;"),
    ],
)
def test_an_id_that_is_none_of_ours_is_refused(header):
    with pytest.raises(Problem) as caught:
        Seen.parse(header)
    assert (caught.value.status_code, caught.value.members["field"]) == (422, "Last-Event-ID")


# The events of a job, with the test in the place of the workers.


def events_of(text):
    """The events in a stream, without its pings: name, id, content."""
    found = []
    for block in text.replace("\r\n", "\n").split("\n\n"):
        lines = [line.partition(": ") for line in block.split("\n") if line and not line.startswith(":")]
        fields = {name: value for name, _, value in lines}
        if fields:
            found.append((fields["event"], fields.get("id"), json.loads(fields["data"])))
    return found


@pytest.fixture
def record(store):
    """A job of three chunks, the first of which is done."""
    made = make_job(store)
    do_chunk(store, made, 0)
    return made


def finish(store, record):
    for chunk in range(record.num_chunks):
        if not store.has_part(record.id, chunk):
            do_chunk(store, record, chunk)
    assert finalise(store, record.id, read_all=False) == []


def test_a_job_that_is_over_has_its_parts_and_its_end_as_events(api, store, record):
    finish(store, record)
    response = api.get(f"/jobs/{record.id}/events")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    assert [(name, id_) for name, id_, _ in events] == [
        ("part", "0;"),
        ("part", "0-1;"),
        ("part", "0-2;"),
        ("end", "0-2;succeeded"),
    ]
    job = api.get(f"/jobs/{record.id}").json()
    assert [content for name, _, content in events if name == "part"] == job["parts"]
    assert events[-1][2] == job | {"parts": [], "parts_next": None}


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_a_stream_that_goes_on_tells_of_the_parts_that_are_missing_and_of_none_twice(api, store, record):
    finish(store, record)
    for last, parts in ((";", [0, 1, 2]), ("0;running", [1, 2]), ("1;", [0, 2]), ("0-2;running", [])):
        events = events_of(api.get(f"/jobs/{record.id}/events", headers={"last-event-id": last}).text)
        assert [content["index"] for name, _, content in events if name == "part"] == parts
        assert events[-1][:2] == ("end", "0-2;succeeded")


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_whoever_has_seen_the_end_gets_204_until_there_is_more(api, store, record):
    finish(store, record)
    response = api.get(f"/jobs/{record.id}/events", headers={"last-event-id": "0-2;succeeded"})
    assert (response.status_code, response.content) == (204, b"")
    store.expire(record.id)
    events = events_of(api.get(f"/jobs/{record.id}/events", headers={"last-event-id": "0-2;succeeded"}).text)
    assert [(name, content["status"]) for name, _, content in events] == [("end", "expired")]


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_a_failed_job_ends_with_why(api, store, record):
    for chunk in (1, 2):
        store.note_failure(record.id, chunk, "no way", crashed=False, limit=1)
    *_, (name, id_, content) = events_of(api.get(f"/jobs/{record.id}/events").text)
    assert (name, id_, content["status"]) == ("end", "0;failed", "failed")
    assert "no way" in content["error"]


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_what_is_wrong_before_a_stream_begins_is_a_problem(api, store, record):
    assert kind(api.get(f"/jobs/{UNKNOWN}/events")) == (404, "job-not-found")
    response = api.get(f"/jobs/{record.id}/events", headers={"last-event-id": "yesterday"})
    assert kind(response) == (422, "invalid-request")
    assert response.json()["field"] == "Last-Event-ID"
    store.storage.write(job_names(record.id).record, b"rubbish")
    assert kind(api.get(f"/jobs/{record.id}/events")) == (500, "job-damaged")


def look_of(store, job_id, live=None):
    files = JobStore(store.storage).files(job_id)
    view = files.view(live or Live({}), parts_limit=0)
    return Look(files, view, is_over=view.status.is_final)


def collect(looks, first, seen, until):
    """The events while `looks` are taken one after the other; the server stops after the event `until`."""
    found = []

    async def run():
        stopping = anyio.Event()

        async def look():
            result = looks.pop(0)()
            if isinstance(result, Exception):
                raise result
            return result

        async for event in job_events(look, first, seen, stopping):
            found.append((event.event, event.id))
            if event.event == until:
                stopping.set()

    anyio.run(run)
    return found


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_a_fault_of_the_storage_does_not_end_a_stream(store, record, caplog):
    first = look_of(store, record.id)

    def finished():
        finish(store, record)
        return look_of(store, record.id)

    looks = [lambda: StorageError("no answer"), finished]
    events = collect(looks, first, Seen(), "end")
    assert [name for name, _ in events] == ["progress", "part", "part", "part", "end"]
    assert "no answer" in caplog.text


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_nothing_is_told_while_nothing_changes(store, record):
    store.cancel(record.id)
    same = look_of(store, record.id, Live({1: 2}))
    after = look_of(store, record.id)
    events = collect([lambda: same, lambda: after], same, Seen(), "end")
    assert events == [
        ("progress", ";cancelling"),
        ("part", "0;cancelling"),
        ("end", "0;cancelled"),
    ]


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
def test_ids_stay_short_when_parts_come_far_out_of_order(store):
    record = make_job(store, count=600, chunk_rows=1)
    for chunk in range(0, 600, 2):
        do_chunk(store, record, chunk)
    first = look_of(store, record.id)

    def others():
        for chunk in range(1, 600, 2):
            do_chunk(store, record, chunk)
        return look_of(store, record.id)

    def over():
        finish(store, record)
        return look_of(store, record.id)

    events = collect([others, over], first, Seen(), "end")
    assert max(len(id_) for _, id_ in events) < 1000
    assert len([name for name, _ in events if name == "part"]) == 600
    assert events[-1] == ("end", "0-599;succeeded")


# A server that is a process, with clients that wait.


class Stream(threading.Thread):
    """A client that reads the events of a job until they end."""

    def __init__(self, url, last_event_id=None):
        super().__init__(daemon=True)
        self.url, self.headers = url, {"last-event-id": last_event_id} if last_event_id else {}
        self.text, self.error = "", None
        self.start()

    def run(self):
        try:
            with httpx.stream("GET", self.url, headers=self.headers, timeout=60) as response:
                for text in response.iter_text():
                    self.text += text
        except httpx.TransportError as exc:
            self.error = exc

    @property
    def events(self):
        return events_of(self.text.rpartition("\r\n\r\n")[0])


@pytest.fixture
def served(lone_api, broker, redis, tmp_path):
    """A server, its store, and a job of three chunks in there."""
    announce(redis)
    url = lone_api(broker.url)
    store = JobStore(open_storage(str(tmp_path / "storage")))
    return url, store, make_job(store)


def test_a_stream_tells_what_happens_while_it_happens(served, redis):
    url, store, record = served
    stream = Stream(f"{url}/jobs/{record.id}/events")
    wait_for(lambda: [name for name, _, _ in stream.events] == ["progress"])
    redis.hset(keys.progress(record.id), "0", 3)
    wait_for(lambda: [content["num_done"] for name, _, content in stream.events if name == "progress"] == [0, 3])
    do_chunk(store, record, 0)
    wait_for(lambda: ("part", "0;running") in [event[:2] for event in stream.events])
    finish(store, record)
    stream.join(timeout=30)
    assert (stream.is_alive(), stream.error) == (False, None)
    assert stream.events[-1][:2] == ("end", "0-2;succeeded")
    parts = [content["index"] for name, _, content in stream.events if name == "part"]
    assert parts == [0, 1, 2]


def test_a_client_that_goes_away_ends_the_work_for_it(served):
    url, _, record = served

    def in_progress():
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        [line] = [line for line in lines if line.startswith("layerstack_http_requests_in_progress")]
        return float(line.split()[-1])

    alone = in_progress()
    with httpx.stream("GET", f"{url}/jobs/{record.id}/events"):
        assert in_progress() == alone + 1
    wait_for(lambda: in_progress() == alone)


def test_a_job_that_is_deleted_ends_its_streams(served):
    url, store, record = served
    stream = Stream(f"{url}/jobs/{record.id}/events")
    wait_for(lambda: stream.events)
    store.delete(record.id)
    stream.join(timeout=30)
    assert (stream.is_alive(), stream.error) == (False, None)
    assert stream.events[-1] == ("deleted", None, {"id": record.id})


def test_streams_go_on_without_the_broker_and_end_when_the_server_stops(spawn, broker, redis, tmp_path):
    announce(redis)
    port = free_port()
    process = spawn("api", port=port, broker_url=broker.url, storage=tmp_path / "storage")
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: status_of(f"{url}/health") == 200, process, process.log)
    store = JobStore(open_storage(str(tmp_path / "storage")))
    record = make_job(store)
    stream = Stream(f"{url}/jobs/{record.id}/events")
    wait_for(lambda: stream.events)
    broker.process.terminate()
    broker.process.wait()
    do_chunk(store, record, 0)
    wait_for(lambda: "part" in [name for name, _, _ in stream.events])
    process.send_signal(signal.SIGTERM)
    stream.join(timeout=30)
    assert process.wait(timeout=30) == 0
    assert (stream.is_alive(), stream.error) == (False, None)
    names = [name for name, _, _ in stream.events]
    assert "end" not in names
    assert "Traceback" not in process.log.read_text()
