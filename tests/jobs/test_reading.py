import json

from jobs.layout import job_names
from tests.sample_jobs import do_chunk, make_job


def test_failures_of_chunks_that_are_done_are_not_read(store):
    record = make_job(store)
    for chunk in range(2):
        store.note_failure(record.id, chunk, "x", crashed=True, limit=9)
    do_chunk(store, record, 0)
    assert list(store.files(record.id).failures) == [1]


def test_a_failure_that_cannot_be_read_is_counted_anew(store):
    record = make_job(store)
    store.note_failure(record.id, 0, "x", crashed=False, limit=1)
    store.storage.write(job_names(record.id).failure(0), b"{")
    assert store.failure(record.id, 0) is None
    assert store.files(record.id).failures == {}
    assert store.note_failure(record.id, 0, "y", crashed=False, limit=2).attempts == 1


def test_a_mark_of_the_start_that_cannot_be_read_tells_that_the_job_has_started(store, caplog):
    record = make_job(store)
    store.storage.write(job_names(record.id).started, b"{")
    files = store.files(record.id)
    assert files.status() == "running"
    assert files.started.at == store.marks(record.id)[job_names(record.id).started]
    assert "when a job was begun is not known" in caplog.text


def test_the_parts_that_were_reported_last_are_told_with_their_rows(store):
    record = make_job(store, count=41, chunk_rows=1)
    for chunk in range(40):
        do_chunk(store, record, chunk)
    reported = store.files(record.id).reported
    assert len(reported) == 32
    assert {each.rows for each in reported} == {1}
    files = {file.name: file.modified_at for file in store.storage.files(job_names(record.id).parts_folder)}
    newest = sorted((at for name, at in files.items() if name.endswith(".json")), reverse=True)[:32]
    assert sorted((each.at for each in reported), reverse=True) == newest


def test_a_record_without_the_fields_of_later_versions_can_be_read(store):
    record = make_job(store)
    name = job_names(record.id).record
    stored = json.loads(store.storage.read(name))
    for later in ("on_error", "owner", "idempotency"):
        del stored[later]
    store.storage.write(name, json.dumps(stored).encode())
    assert store.load(record.id) == record
    store.delete(record.id)
