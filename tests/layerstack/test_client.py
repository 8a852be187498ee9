import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import numpy as np
import pytest

import layerstack
from api.jobrequest import MAX_JSON_PROMPTS
from jobs.records import JobStatus
from jobs.results import finalise
from layerstack.errors import (
    AnswerLostError,
    ApiKeyError,
    DownloadError,
    ReadError,
    ServerError,
    ServerUnreachableError,
)
from tests.sample_jobs import do_chunk, make_job
from tests.support import free_port, status_of, wait_for


@pytest.fixture
def client(stack):
    with layerstack.Client(stack.url) as found:
        yield found


@pytest.fixture
def job(client):
    """A finished job of five prompts in three parts."""
    made = client.submit([f"prompt {n}" for n in range(5)], {"chunk_rows": 2})
    wait_for(lambda: client.job(made.id).status == JobStatus.SUCCEEDED)
    return client.job(made.id)


def test_predict_gives_dense_arrays(client, reference):
    answer = client.predict(["a fox", "over-long " * 2000])
    np.testing.assert_allclose(answer.prompt_embeds[:1], reference(["a fox"]), rtol=1e-4, atol=1e-4)
    assert answer.text_ids.shape == (2, 512, 4)
    assert answer.truncated == [False, True]
    assert answer.fingerprint == client.encoder().fingerprint


def test_a_file_of_prompts_is_submitted(client, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"a"\n{"id": "x", "prompt": "b"}\n')
    job = client.submit(path, {"dtype": "float16"})
    assert (job.num_prompts, job.options.dtype) == (2, "float16")
    assert job.id in [listed.id for listed in client.jobs()]


def test_a_fetched_job_reads_like_the_servers_own(client, job, stack, tmp_path):
    seen = []
    manifest = client.fetch(
        job.id, tmp_path / "got", lambda part: seen.append(part.index), on_begin=lambda all_: seen.append(all_.bytes)
    )
    assert (manifest.rows, seen) == (5, [manifest.bytes, 0, 1, 2])
    got, own = layerstack.read(tmp_path / "got"), layerstack.read(stack.storage / "jobs" / job.id)
    for a, b in zip(got, own, strict=True):
        assert a["id"] == b["id"]
        assert (a["prompt_embeds"] == b["prompt_embeds"]).all()


def test_a_finished_job_can_be_checked_again_but_not_cancelled_and_be_deleted(client, job):
    with pytest.raises(ServerError, match="is succeeded and cannot be cancelled") as caught:
        client.cancel(job.id)
    assert caught.value.status == 409
    assert client.retry(job.id).status == JobStatus.RUNNING
    wait_for(lambda: client.job(job.id).status == JobStatus.SUCCEEDED)
    client.delete(job.id)
    with pytest.raises(ServerError, match=f"no job '{job.id}'"):
        client.job(job.id)


def test_a_job_can_be_cancelled(client):
    made = client.submit([f"prompt number {n}" for n in range(1_000)], {"chunk_rows": 100})
    assert client.cancel(made.id).status in {JobStatus.CANCELLING, JobStatus.CANCELLED}
    wait_for(lambda: client.job(made.id).status == JobStatus.CANCELLED)
    client.delete(made.id)


def test_fetching_again_downloads_only_what_is_missing_or_damaged(client, job, tmp_path, monkeypatch):
    client.fetch(job.id, tmp_path)
    parts = tmp_path / "parts"
    (parts / "00000.parquet").write_bytes(b"damaged")
    (parts / "00002.parquet").unlink()
    fetched = []
    stream = client._stream
    monkeypatch.setattr(client, "_stream", lambda path: fetched.append(path) or stream(path))
    client.fetch(job.id, tmp_path)
    assert [path.rpartition("/")[2] for path in fetched] == ["0", "2"]
    assert len(layerstack.read(tmp_path)) == 5


def test_a_fetch_into_the_folder_of_another_job_that_breaks_off_is_not_read_as_whole(
    client, job, tmp_path, monkeypatch
):
    other = client.submit([f"another prompt {n}" for n in range(5)], {"chunk_rows": 2})
    wait_for(lambda: client.job(other.id).status == JobStatus.SUCCEEDED)
    client.fetch(job.id, tmp_path)
    fetch_part = client._fetch_part

    def until_the_second(job_id, part, path):
        if part.index == 1:
            raise KeyboardInterrupt
        fetch_part(job_id, part, path)

    monkeypatch.setattr(client, "_fetch_part", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        client.fetch(other.id, tmp_path)
    with pytest.raises(ReadError, match="download is not complete"):
        layerstack.read(tmp_path)
    monkeypatch.undo()
    client.fetch(other.id, tmp_path)
    assert [row["prompt"] for row in layerstack.read(tmp_path)] == [f"another prompt {n}" for n in range(5)]


def test_fetching_again_keeps_the_manifest_and_removes_what_a_fetch_that_was_killed_left(client, job, tmp_path):
    client.fetch(job.id, tmp_path)
    left = [tmp_path / ".manifest.json.abc.tmp", tmp_path / "parts" / ".00000.parquet.abc.tmp"]
    for path in left:
        path.write_bytes(b"half a file")
    seen = []
    client.fetch(job.id, tmp_path, on_part=lambda _: seen.append((tmp_path / "manifest.json").is_file()))
    assert seen == [True] * 3
    assert not any(path.exists() for path in left)


def test_a_part_that_arrives_damaged_is_named_and_not_kept(client, job, stack, tmp_path):
    path = stack.storage / "jobs" / job.id / "parts" / "00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(DownloadError, match=f"part 1 of job {job.id}"):
        client.fetch(job.id, tmp_path)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["00000.parquet"]
    assert not (tmp_path / "manifest.json").exists()


def test_more_prompts_than_a_json_body_may_have_are_submitted_as_a_list(client):
    made = client.submit([""] * (MAX_JSON_PROMPTS + 1))
    client.delete(made.id)
    assert made.num_prompts == MAX_JSON_PROMPTS + 1


@pytest.fixture
def server():
    """Answer each request with what the test says, after it has come whole: bytes, or seconds to wait."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as thread:

        def answer(*script):
            def serve():
                connection, _ = listening.accept()
                with connection:
                    while not connection.recv(2**16).rstrip().endswith(b"--"):
                        pass
                    for step in script:
                        connection.sendall(step) if isinstance(step, bytes) else time.sleep(step)

            thread.submit(serve)
            return f"http://127.0.0.1:{listening.getsockname()[1]}"

        yield answer


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 202 Acc"])
def test_a_job_whose_answer_got_lost_may_exist_and_the_error_says_so(server, answer):
    url = server(answer)
    with (
        pytest.raises(AnswerLostError, match=rf"{url} .* may exist .*`layerstack jobs list` before you send it again"),
        layerstack.Client(url) as client,
    ):
        client.submit(["a"])


def test_the_answer_to_a_new_job_is_waited_for_however_long_it_takes(server):
    url = server(1.0, b"HTTP/1.1 507 Full\r\nContent-Length: 4\r\n\r\nfull")
    with pytest.raises(ServerError, match="HTTP 507: full"), layerstack.Client(url, timeout_s=0.2) as client:
        client.submit(["a"])


def test_a_job_that_could_not_even_be_sent_does_not_exist():
    with pytest.raises(ServerUnreachableError), layerstack.Client("http://127.0.0.1:9") as client:
        client.submit(["a"])


def test_a_string_is_neither_taken_for_a_path_nor_for_prompts(client):
    with pytest.raises(TypeError, match=r"pathlib\.Path, not the string 'p\.txt'"):
        client.submit("p.txt")


def test_what_the_server_says_is_in_the_error(client):
    with pytest.raises(ServerError, match="at most 16") as caught:
        client.predict(["a"] * 17)
    assert caught.value.status == 413
    assert caught.value.problem["limit"] == 16


def test_an_answer_of_another_kind_of_server_is_an_error_too():
    client = layerstack.Client()
    client._http = httpx.Client(
        base_url="http://proxy", transport=httpx.MockTransport(lambda _: httpx.Response(502, text="<html>bad gateway"))
    )
    with pytest.raises(ServerError, match="HTTP 502: <html>bad gateway"), client:
        client.jobs()


def test_a_key_is_sent_that_is_given_or_in_the_environment(keyed_url, monkeypatch):
    monkeypatch.setenv("LAYERSTACK_API_KEY", "ls_of-ann\n")
    for given in ({}, {"api_key": "ls_of-ann"}):
        with layerstack.Client(keyed_url, **given) as client:
            assert client.jobs() == []
    with layerstack.Client(keyed_url, api_key="ls_of-eve") as client, pytest.raises(ServerError) as caught:
        client.jobs()
    assert caught.value.status == 401


@pytest.mark.parametrize("key", ["ls_ä", "ls_a\nls_b", "ls_a ls_b"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key):
    with pytest.raises(ApiKeyError) as caught:
        layerstack.Client(api_key=key)
    assert "LAYERSTACK_API_KEY" in str(caught.value)
    assert "ls_" not in str(caught.value)


def test_nobody_at_the_url_is_an_error_that_names_it():
    with (
        pytest.raises(ServerUnreachableError, match=r"http://127\.0\.0\.1:9"),
        layerstack.Client("http://127.0.0.1:9") as client,
    ):
        client.jobs()


def test_a_url_without_a_scheme_is_no_answer_that_got_lost():
    with layerstack.Client("localhost:7860") as client, pytest.raises(ServerUnreachableError, match="protocol"):
        client.submit(["a fox"])


class _Redirecting(BaseHTTPRequestHandler):
    """Answers with a redirect to `elsewhere` if there is one, or else with a word."""

    def do_GET(self):
        server = self.server
        server.seen.append(self.headers)
        self.send_response(307 if server.elsewhere else 200)
        if server.elsewhere:
            self.send_header("Location", server.elsewhere)
        self.send_header("Content-Length", "0" if server.elsewhere else "4")
        self.end_headers()
        self.wfile.write(b"" if server.elsewhere else b"PAR1")

    def log_message(self, *_):
        """Say nothing."""


@contextmanager
def answering(elsewhere):
    """A server that redirects to a URL, or else has the content itself."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Redirecting) as server:
        server.elsewhere, server.seen = elsewhere, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_the_key_is_not_sent_on_to_where_a_server_redirects():
    with answering(None) as store, answering(f"{store.url}/bucket/part") as server:
        with (
            layerstack.Client(server.url, api_key="ls_secret") as client,
            client._stream("/jobs/x/parts/0") as response,
        ):
            assert response.read() == b"PAR1"
        assert server.seen[0]["Authorization"] == "Bearer ls_secret"
        assert store.seen[0]["Authorization"] is None
        assert "ls_secret" not in str(store.seen[0])


@pytest.mark.parametrize("storage_url", ["s3"], indirect=True)
def test_a_job_is_fetched_from_an_object_store_by_signed_links(spawn, broker, storage_url, store, tmp_path):
    record = make_job(store)
    for chunk in range(record.num_chunks):
        do_chunk(store, record, chunk)
    assert finalise(store, record.id, read_all=False) == []
    port = free_port()
    api = spawn("api", port=port, broker_url=broker.url, storage=storage_url, presigned_url_s=60)
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: status_of(f"{url}/health") == 200, api, api.log)
    assert httpx.get(f"{url}/jobs/{record.id}/parts/0").status_code == 307
    with layerstack.Client(url) as client:
        client.fetch(record.id, tmp_path / "got")
    assert [row["id"] for row in layerstack.read(tmp_path / "got")] == [f"id{n}" for n in range(10)]
