import hashlib
import os
import random
import signal
from datetime import UTC, datetime
from itertools import pairwise
from threading import Event

import httpx
import pytest

import layerstack
from jobs.files import sha256_of
from jobs.records import Manifest, PartSummary
from jobs.results import finalise
from layerstack.errors import DownloadError, ReadError, ServerError
from tests.layerstack.servers import Answer, answering, problem
from tests.sample_jobs import do_chunk, make_job
from tests.support import free_port, status_of, wait_for

JOB = "01M89S02QC8BKBM49Y5DE15Q8S"
PARTS = [random.Random(n).randbytes(300_000 + n) for n in range(3)]


def manifest_of(parts):
    counts = {"succeeded": 1, "failed": 0, "truncated": 0, "tokens": 1, "rows": 1}
    summaries = [
        PartSummary(index=n, bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), **counts)
        for n, content in enumerate(parts)
    ]
    total = {name: count * len(parts) for name, count in counts.items()} | {"bytes": sum(map(len, parts))}
    return Manifest(job_id=JOB, fingerprint="f", finished_at=datetime.now(UTC), parts=summaries, errors=[], **total)


def range_of(start):
    return {"Content-Range": f"bytes {start}-"} if start else {}


class Server:
    """Has a job of three parts; `breaks` are after how many bytes each answer with a part breaks off."""

    def __init__(self, parts=PARTS):
        self.parts, self.manifest = parts, manifest_of(parts)
        self.breaks, self.ranges = [], []
        self.honours_range = True
        self.busy = 0  # answers that it puts off
        self.hold = None  # what answers wait for after 100,000 bytes

    def __call__(self, request):
        if request.path.endswith("/results"):
            return Answer(200, self.manifest.model_dump_json().encode())
        if self.busy:
            self.busy -= 1
            return problem(503, "storage-unavailable", retry_after=0)
        index = int(request.path.rpartition("/")[2])
        asked = request.headers.get("Range") if self.honours_range else None
        self.ranges.append((index, request.headers.get("Range")))
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        stop = 100_000 if self.hold else self.breaks.pop(0) if self.breaks else None
        return Answer(206 if asked else 200, self.parts[index][start:], range_of(start), stop=stop, hold=self.hold)

    def interrupt(self, client, folder, at_bytes):
        """Begin a download, and press Ctrl-C once it has so many bytes."""
        self.hold = Event()

        def stop(now):
            if now.bytes_done == at_bytes:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            client.jobs.download(JOB, folder, on_progress=stop)
        self.hold.set()
        self.hold = None


@pytest.fixture
def server():
    respond = Server()
    with answering(respond) as running:
        respond.url = running.url
        yield respond


@pytest.fixture
def client(server):
    with layerstack.Client(server.url) as found:
        yield found


def assert_whole(folder, parts=PARTS):
    found = sorted((folder / "parts").iterdir())
    assert [path.name for path in found] == [f"{n:05d}.parquet" for n in range(len(parts))]
    assert [path.read_bytes() for path in found] == parts
    assert (folder / "manifest.json").is_file()


def test_parts_come_with_their_manifest_and_progress_is_told(client, tmp_path):
    told = []
    manifest = client.jobs.download(JOB, str(tmp_path / "got"), on_progress=told.append)
    assert_whole(tmp_path / "got")
    assert (told[-1].parts_done, told[-1].parts) == (3, 3)
    assert told[-1].bytes_done == told[-1].bytes == manifest.bytes
    assert all(earlier.bytes_done <= later.bytes_done for earlier, later in pairwise(told))


def test_a_part_that_breaks_off_goes_on_where_it_stopped(client, server, tmp_path):
    server.parts = server.parts[:1]
    server.manifest = manifest_of(server.parts)
    server.breaks = [100_000, 50_000]
    client.jobs.download(JOB, tmp_path)
    assert_whole(tmp_path, PARTS[:1])
    assert server.ranges == [(0, None), (0, "bytes=100000-"), (0, "bytes=150000-")]


def test_a_download_that_is_interrupted_twice_goes_on_with_the_bytes_that_it_has(client, server, tmp_path):
    for at_bytes in (300_000, 600_000):
        server.interrupt(client, tmp_path, at_bytes)
        assert not (tmp_path / "manifest.json").exists()
        with pytest.raises(ReadError, match="download is not complete"):
            layerstack.read(tmp_path)
    before = sum(path.stat().st_size for path in (tmp_path / "parts").iterdir())
    assert before == 600_000
    server.ranges.clear()
    told = []
    client.jobs.download(JOB, tmp_path, on_progress=told.append)
    assert_whole(tmp_path)
    assert all(asked is not None for _, asked in server.ranges)
    asked_for = sum(len(PARTS[index]) - int(asked[6:-1]) for index, asked in server.ranges)
    assert asked_for == sum(map(len, PARTS)) - before


def test_parts_that_are_there_stay_and_damaged_or_missing_ones_come_again(client, server, tmp_path):
    client.jobs.download(JOB, tmp_path)
    parts = tmp_path / "parts"
    flipped = bytearray(PARTS[0])
    flipped[1000] ^= 1
    (parts / "00000.parquet").write_bytes(flipped)
    (parts / "00002.parquet").unlink()
    server.ranges.clear()
    seen = []
    client.jobs.download(JOB, tmp_path, on_progress=lambda _: seen.append((tmp_path / "manifest.json").is_file()))
    assert sorted(index for index, _ in server.ranges) == [0, 2]
    assert all(seen)
    assert_whole(tmp_path)


def test_what_an_interrupted_download_left_damaged_is_begun_anew(client, server, tmp_path):
    server.parts = server.parts[:1]
    server.manifest = manifest_of(server.parts)
    partial = tmp_path / "parts" / f".00000.parquet.{server.manifest.parts[0].sha256[:16]}.partial"
    partial.parent.mkdir()
    partial.write_bytes(b"\0" * 1000)
    client.jobs.download(JOB, tmp_path)
    assert server.ranges == [(0, "bytes=1000-"), (0, None)]
    assert_whole(tmp_path, PARTS[:1])


def test_a_server_that_knows_no_ranges_sends_the_part_from_its_beginning(client, server, tmp_path):
    server.honours_range, server.breaks = False, [100_000]
    client.jobs.download(JOB, tmp_path)
    assert_whole(tmp_path)


def test_a_flipped_byte_is_told_with_the_name_of_the_part_and_nothing_of_it_is_kept(client, server, tmp_path):
    flipped = bytearray(PARTS[1])
    flipped[777] ^= 1
    server.parts = [PARTS[0], bytes(flipped), PARTS[2]]
    with pytest.raises(
        DownloadError, match=rf"00001\.parquet, part 1 of job {JOB}, is damaged.*`layerstack jobs retry`"
    ):
        client.jobs.download(JOB, tmp_path)
    assert not [path for path in (tmp_path / "parts").iterdir() if "00001" in path.name]
    assert not (tmp_path / "manifest.json").exists()


def test_a_part_that_breaks_off_again_and_again_is_given_up_and_named(client, server, tmp_path, monkeypatch):
    monkeypatch.setattr("layerstack.transport._SHORTEST_WAIT_S", 0.001)
    server.breaks = [0] * 30
    with pytest.raises(DownloadError, match=r"0000\d\.parquet, part \d of .* breaks off at byte 0 of 30000\d"):
        client.jobs.download(JOB, tmp_path)


def test_a_server_that_is_busy_is_waited_for_and_told_of(server, tmp_path):
    told = []
    server.busy = 2
    with layerstack.Client(server.url, on_retry=lambda *why: told.append(why)) as client:
        client.jobs.download(JOB, tmp_path)
    assert_whole(tmp_path)
    assert [exc.kind for exc, _ in told] == ["storage-unavailable"] * 2


def test_more_bytes_than_the_manifest_says_are_not_written(client, server, tmp_path):
    server.parts = [PARTS[0], PARTS[1] + bytes(10_000_000), PARTS[2]]
    told = []
    with pytest.raises(DownloadError, match=r"00001\.parquet, .* is damaged"):
        client.jobs.download(JOB, tmp_path, on_progress=lambda now: told.append(now.bytes_done))
    assert max(told) < 2_000_000


def test_a_job_that_is_not_done_is_told_and_leaves_nothing(tmp_path):
    refusal = problem(404, "not-there-yet")
    with (
        answering(lambda _: refusal) as server,
        layerstack.Client(server.url) as client,
        pytest.raises(ServerError, match="not-there-yet"),
    ):
        client.jobs.download(JOB, tmp_path / "got")
    assert not (tmp_path / "got").exists()


def test_a_download_over_that_of_another_job_is_not_read_as_whole_until_its_end(client, server, tmp_path):
    client.jobs.download(JOB, tmp_path)
    server.parts = [content[::-1] for content in PARTS]
    server.manifest = manifest_of(server.parts)

    server.interrupt(client, tmp_path, 300_000)
    with pytest.raises(ReadError, match="download is not complete"):
        layerstack.read(tmp_path)
    client.jobs.download(JOB, tmp_path)
    assert_whole(tmp_path, server.parts)


def test_what_a_download_that_was_killed_left_of_another_job_is_removed(client, tmp_path):
    left = [
        tmp_path / ".manifest.json.abc.tmp",
        tmp_path / "parts" / ".00000.parquet.abc.tmp",
        tmp_path / "parts" / ".00000.parquet.0123456789abcdef.partial",
    ]
    left[1].parent.mkdir()
    for path in left:
        path.write_bytes(b"half a file")
    client.jobs.download(JOB, tmp_path)
    assert not any(path.exists() for path in left)


def test_two_downloads_to_one_folder_do_not_mix(client, tmp_path):
    def begin_another(now):
        if now.bytes_done == now.bytes:
            return
        with layerstack.Client(client.url) as other, pytest.raises(DownloadError, match="by another process"):
            other.jobs.download(JOB, tmp_path)

    client.jobs.download(JOB, tmp_path, on_progress=begin_another)
    assert_whole(tmp_path)


@pytest.mark.parametrize("storage_url", ["s3"], indirect=True)
def test_a_job_comes_from_an_object_store_by_signed_links_and_goes_on_there(
    spawn, broker, storage_url, store, tmp_path
):
    record = make_job(store)
    for chunk in range(record.num_chunks):
        do_chunk(store, record, chunk)
    assert finalise(store, record.id, read_all=False) == []
    port = free_port()
    api = spawn("api", port=port, broker_url=broker.url, storage=storage_url, presigned_url_s=60)
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: status_of(f"{url}/health") == 200, api, api.log)
    assert httpx.get(f"{url}/jobs/{record.id}/parts/0").status_code == 307
    got = tmp_path / "got"
    with layerstack.Client(url) as client:
        manifest = client.jobs.download(record.id, got)
        whole = (got / "parts" / "00000.parquet").read_bytes()
        (got / "parts" / "00000.parquet").unlink()
        partial = got / "parts" / f".00000.parquet.{manifest.parts[0].sha256[:16]}.partial"
        partial.write_bytes(whole[:500])
        client.jobs.download(record.id, got)
    assert sha256_of(got / "parts" / "00000.parquet") == manifest.parts[0].sha256
    assert [row["id"] for row in layerstack.read(got)] == [f"id{n}" for n in range(10)]
