import httpx
import numpy as np
import pytest

import layerstack
from jobs.records import JobStatus
from layerstack.errors import DownloadError, ServerError, ServerUnreachableError
from tests.support import wait_for


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
    manifest = client.fetch(job.id, tmp_path / "got", on_part=lambda part: seen.append(part.index))
    assert (manifest.rows, seen) == (5, [0, 1, 2])
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


def test_a_part_that_arrives_damaged_is_named_and_not_kept(client, job, stack, tmp_path):
    path = stack.storage / "jobs" / job.id / "parts" / "00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(DownloadError, match=f"part 1 of job {job.id}"):
        client.fetch(job.id, tmp_path)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["00000.parquet"]
    assert not (tmp_path / "manifest.json").exists()


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


def test_nobody_at_the_url_is_an_error_that_names_it():
    with (
        pytest.raises(ServerUnreachableError, match=r"http://127\.0\.0\.1:9"),
        layerstack.Client("http://127.0.0.1:9") as client,
    ):
        client.jobs()
