import hashlib
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

import layerstack
from jobs.layout import job_names
from jobs.results import finalise
from jobs.storage import open_storage
from jobs.store import JobStore
from layerstack.errors import ReadError, ServerError, ServerUnreachableError
from tests.sample_jobs import do_chunk, make_job
from tests.support import free_port, status_of, wait_for

KEY = "ls_of-ann"


def finished(store, bad=(), **options):
    """Make a job of ten prompts in three parts, and finish it."""
    record = make_job(store, **options)
    for chunk in range(record.num_chunks):
        do_chunk(store, record, chunk, bad)
    assert finalise(store, record.id, read_all=True) == []
    return record


def indices(rows):
    return [row["index"] for row in rows]


@pytest.fixture
def serve(spawn, broker):
    """Start a server on a storage, which needs no worker to give away what is there; returns its URL."""

    def start(storage_url, **settings):
        port = free_port()
        process = spawn("api", port=port, broker_url=broker.url, storage=storage_url, **settings)
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: status_of(f"{url}/health") == 200, process, process.log)
        return url

    return start


def test_a_job_a_folder_and_a_part_of_each_kind_of_storage_can_be_read(store, storage_url):
    record = finished(store, bad={5})
    job = f"{storage_url}/{job_names(record.id).folder}"
    rows = layerstack.read(job, skip_failed=True)
    assert indices(rows) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert rows.by_id("id7")["index"] == rows.by_index(7)["index"] == 7
    np.testing.assert_array_equal(rows[0]["prompt_embeds"][-1], np.ones(4))
    rows.verify()
    assert indices(layerstack.read(f"{job}/parts")[:3]) == [0, 1, 2]
    assert indices(layerstack.read(f"{job}/parts/00002.parquet")) == [8, 9]


def test_a_job_of_a_storage_that_is_not_finished_is_not_read_as_whole(store, storage_url):
    record = make_job(store)
    do_chunk(store, record, 1)
    job = f"{storage_url}/{job_names(record.id).folder}"
    with pytest.raises(ReadError, match=r"2 of 3 parts are missing, the first is 00000\.parquet.*open .*/parts$"):
        layerstack.read(job)
    assert indices(layerstack.read(f"{job}/parts")) == [4, 5, 6, 7]


def test_a_part_that_is_cut_off_is_named(store, storage_url):
    record = finished(store)
    name = job_names(record.id).part(1)
    store.storage.write(name, store.storage.read(name)[:-1])
    with pytest.raises(ReadError, match=rf"{name} has \d+ bytes, and \d+ by the manifest"):
        layerstack.read(f"{storage_url}/{job_names(record.id).folder}")


def test_a_part_that_is_damaged_is_named_when_it_is_needed(store, storage_url):
    record = finished(store)
    name = job_names(record.id).part(1)
    store.storage.write(name, b"x" * store.storage.size(name))
    rows = layerstack.read(f"{storage_url}/{job_names(record.id).folder}")
    assert rows[0]["index"] == 0
    with pytest.raises(ReadError, match=rf"{name} is damaged"):
        rows[4]
    with pytest.raises(ReadError, match=rf"{name}: damaged, the SHA-256"):
        rows.verify()


def test_a_part_that_goes_away_is_named(store, storage_url):
    record = finished(store)
    name = job_names(record.id).part(1)
    rows = layerstack.read(f"{storage_url}/{job_names(record.id).folder}")
    store.storage.delete(name)
    with pytest.raises(ReadError, match=name):
        rows[4]


def test_nothing_in_a_bucket_is_an_error_that_names_it(bucket):
    with pytest.raises(ReadError, match=f"{bucket}/nothing: no parts"):
        layerstack.read(f"{bucket}/nothing")
    with pytest.raises(ReadError, match=f"{bucket} is a whole bucket: name a job's folder"):
        layerstack.read(bucket)


def test_workers_that_are_spawned_read_a_bucket_and_forked_ones_say_how(bucket, tmp_path):
    url = f"{bucket}/{tmp_path.name}"
    record = finished(JobStore(open_storage(url)))
    rows = layerstack.read(f"{url}/{job_names(record.id).folder}")
    loader = DataLoader(rows, batch_size=5, num_workers=1, multiprocessing_context="spawn")
    assert [batch["index"].tolist() for batch in loader] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    with pytest.raises(ReadError, match=r"cannot be read in a forked process: .*multiprocessing_context='spawn'"):
        list(DataLoader(rows, batch_size=5, num_workers=1, multiprocessing_context="fork"))


def test_the_package_for_buckets_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, "jobs.object_storage", raising=False)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ReadError, match="s3://bucket needs the package obstore: pip install obstore"):
        layerstack.read("s3://bucket/job")


def test_a_file_url_is_a_path(tmp_path):
    folder = tmp_path / "a storage"
    record = finished(JobStore(open_storage(str(folder))))
    assert len(layerstack.read((folder / job_names(record.id).folder).as_uri())) == 10


def test_a_path_may_be_relative_or_a_link(tmp_path, monkeypatch):
    record = finished(JobStore(open_storage(str(tmp_path))))
    monkeypatch.chdir(tmp_path / "jobs" / record.id)
    (tmp_path / "link").symlink_to(tmp_path / "jobs" / record.id)
    for path in (".", Path(), "parts", "../../link", f"../{record.id}/"):
        assert len(layerstack.read(path)) == 10


def test_an_address_of_another_kind_says_what_can_be_read():
    with pytest.raises(ReadError, match=r"ftp://host/a: ftp:// cannot be read, only a path, file://, "):
        layerstack.read("ftp://host/a")


@pytest.mark.parametrize("presigned_url_s", [0, 60])
def test_a_job_of_a_server_is_read_without_a_download(serve, bucket, tmp_path, presigned_url_s):
    storage_url = f"{bucket}/{tmp_path.name}"
    record = finished(JobStore(open_storage(storage_url)), bad={5})
    url = f"{serve(storage_url, presigned_url_s=presigned_url_s)}/jobs/{record.id}"
    rows = layerstack.read(url, skip_failed=True)
    assert indices(rows) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert rows.by_index(9)["id"] == rows.by_id("id9")["id"] == "id9"
    rows.verify()
    assert indices(layerstack.read(f"{url}/parts/1", skip_failed=True)) == [4, 6, 7]
    with pytest.raises(ReadError, match=r"/parts/3: the job has 3 parts, from 0 on"):
        layerstack.read(f"{url}/parts/3")


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_a_server_too(serve, tmp_path, context):
    record = finished(JobStore(open_storage(str(tmp_path / "storage"))))
    rows = layerstack.read(f"{serve(tmp_path / 'storage')}/jobs/{record.id}")
    assert rows[9]["index"] == 9  # opens a connection and a part, which no worker may share
    loader = DataLoader(rows, batch_size=5, num_workers=2, multiprocessing_context=context)
    assert [batch["index"].tolist() for batch in loader] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_a_server_with_keys_wants_one(serve, tmp_path, monkeypatch):
    record = finished(JobStore(open_storage(str(tmp_path / "storage"))), owner="ann")
    server = serve(tmp_path / "storage", api_keys=f"ann:{hashlib.sha256(KEY.encode()).hexdigest()}")
    monkeypatch.delenv("LAYERSTACK_API_KEY", raising=False)
    with pytest.raises(ServerError) as told:
        layerstack.read(f"{server}/jobs/{record.id}")
    assert told.value.status == 401
    rows = layerstack.read(f"{server}/jobs/{record.id}", api_key=KEY)
    assert KEY not in repr(rows)
    assert rows[5]["index"] == 5
    monkeypatch.setenv("LAYERSTACK_API_KEY", KEY)
    assert layerstack.read(f"{server}/jobs/{record.id}")[5]["index"] == 5


def test_what_a_server_says_no_to_is_told_in_its_words(serve, tmp_path):
    store = JobStore(open_storage(str(tmp_path / "storage")))
    record, server = make_job(store), serve(tmp_path / "storage")
    with pytest.raises(ServerError, match="queued"):
        layerstack.read(f"{server}/jobs/{record.id}")
    with pytest.raises(ServerError, match="no job"):
        layerstack.read(f"{server}/jobs/{'0' * 26}")


def test_a_part_that_is_damaged_behind_a_server_is_named(serve, tmp_path):
    store = JobStore(open_storage(str(tmp_path / "storage")))
    record = finished(store)
    rows = layerstack.read(f"{serve(tmp_path / 'storage')}/jobs/{record.id}")
    path = Path(store.storage.local_path(job_names(record.id).part(1)))
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ReadError, match=r"/parts/1 is damaged"):
        rows[4]
    with pytest.raises(ReadError, match=r"/parts/1: damaged, the SHA-256"):
        rows.verify()


def test_nobody_behind_an_address_is_an_error_that_names_it():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServerUnreachableError, match=f"no answer from {url}"):
        layerstack.read(f"{url}/jobs/{'0' * 26}")


@pytest.mark.parametrize("path", ["", "/", "/jobs", "/jobs/1", "/encoder"])
def test_another_address_of_a_server_is_refused(path):
    with pytest.raises(ReadError, match=r"is not the address of a job: that is http://HOST:PORT/jobs/ID"):
        layerstack.read(f"http://127.0.0.1:1{path}")


def test_a_dataset_of_a_server_can_be_pickled(serve, tmp_path):
    record = finished(JobStore(open_storage(str(tmp_path / "storage"))))
    rows = layerstack.read(f"{serve(tmp_path / 'storage')}/jobs/{record.id}")
    rows[0]
    assert indices(pickle.loads(pickle.dumps(rows))[3:5]) == [3, 4]  # noqa: S301 - our own bytes
