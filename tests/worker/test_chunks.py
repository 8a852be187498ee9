import numpy as np
import pytest

import layerstack
from worker.chunks import encode_chunk
from worker.errors import FingerprintMismatchError, HandedBackError


def run(store, engine, job_id, chunk, stopping=lambda: False, on_progress=lambda _: None):
    encode_chunk(store, engine, job_id, chunk, stopping=stopping, on_progress=on_progress)


def test_the_rows_of_a_finished_job_equal_the_encoders(store, engine, make_job, tmp_path):
    record = make_job()
    for chunk in (2, 0, 1):
        run(store, engine, record.id, chunk)
    rows = layerstack.read(tmp_path / "storage" / "jobs" / record.id)
    want, _ = engine.encoder.dense(engine.encoder.encode([f"prompt number {n}" for n in range(10)]))
    assert [row["index"] for row in rows] == list(range(10))
    for row, dense in zip(rows, want, strict=True):
        np.testing.assert_allclose(row["prompt_embeds"], dense, rtol=1e-4, atol=1e-4)


def test_the_last_chunk_writes_the_manifest(store, engine, make_job):
    record = make_job(count=8)
    run(store, engine, record.id, 1)
    assert store.finalise(record.id) is None
    run(store, engine, record.id, 0)
    assert store.manifest(record.id).rows == 8


def test_a_chunk_that_is_done_is_not_done_again(store, engine, make_job):
    record = make_job(count=4)
    run(store, engine, record.id, 0)
    before = store.part_path(record.id, 0).stat().st_mtime_ns
    run(store, engine, record.id, 0, stopping=lambda: True)
    assert store.part_path(record.id, 0).stat().st_mtime_ns == before


def test_progress_is_told_after_each_batch(store, engine, make_job):
    record, told = make_job(count=20, chunk_rows=20), []
    run(store, engine, record.id, 0, on_progress=told.append)
    assert told == [8, 16, 20]


def test_a_worker_that_stops_hands_the_chunk_back_and_leaves_nothing(store, engine, make_job, tmp_path):
    record, told = make_job(count=20, chunk_rows=20), []
    with pytest.raises(HandedBackError, match="the worker is stopping"):
        run(store, engine, record.id, 0, stopping=lambda: bool(told), on_progress=told.append)
    assert list((tmp_path / "storage" / "jobs" / record.id / "parts").iterdir()) == []


def test_the_job_of_another_encoder_is_refused(store, engine, make_job):
    record = make_job(fingerprint="0123456789abcdef")
    with pytest.raises(FingerprintMismatchError, match=f"this worker runs {engine.encoder.fingerprint}"):
        run(store, engine, record.id, 0)
