import io
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import layerstack
from encoder import Engine
from jobs.errors import JobNotFoundError, PartFormatError, StorageFullError
from jobs.layout import job_names
from jobs.results import finalise
from tests.sample_jobs import make_job as make_foreign_job
from tests.support import wait_for
from worker.chunks import ChunkEncoder
from worker.errors import (
    DeviceLostError,
    FingerprintMismatchError,
    HandedBackError,
    JobCancelledError,
    PromptFailedError,
)
from worker.recall import Recall


class Watch:
    """Hears of progress, and stops the chunk once `until` rows are done."""

    def __init__(self, until=None, error=JobCancelledError, on_progress=lambda _rows: None):
        self.told = []
        self._until, self._error, self._on_progress = until, error, on_progress

    def check(self):
        if self._until is not None and len(self.told) >= self._until:
            raise self._error

    def progress(self, rows):
        self.told.append(rows)
        self._on_progress(rows)


@pytest.fixture
def chunks(store, engine):
    return ChunkEncoder(store, engine, Recall(engine, max_rows=1000))


def table(store, record, chunk=0):
    return pq.read_table(io.BytesIO(store.storage.read(job_names(record.id).part(chunk))))


def own_rows(store, record, chunk=0):
    return [np.frombuffer(content, np.float32) for content in table(store, record, chunk)["prompt_embeds"].to_pylist()]


def on_the_device(forwards):
    return [text for texts in forwards.texts for text in texts]


def test_the_rows_of_a_finished_job_equal_the_encoders(chunks, store, encoder, make_job, tmp_path):
    record = make_job()
    for chunk in (2, 0, 1):
        chunks.encode(record.id, chunk, Watch())
    assert finalise(store, record.id, read_all=True) == []
    names = job_names(record.id)
    for name in (names.manifest, *(names.part(chunk) for chunk in range(3))):
        path = tmp_path / "fetched" / Path(name).relative_to(names.folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.storage.read(name))
    rows = layerstack.read(tmp_path / "fetched")
    want, _ = encoder.dense(encoder.encode([f"prompt number {n}" for n in range(10)]))
    assert [row["index"] for row in rows] == list(range(10))
    for row, dense in zip(rows, want, strict=True):
        np.testing.assert_allclose(row["prompt_embeds"], dense, rtol=1e-4, atol=1e-4)


def test_rows_are_stored_as_the_job_asks(chunks, store, make_job):
    record = make_job(count=2, layout="dense", dtype="bfloat16", compression="zstd")
    chunks.encode(record.id, 0, Watch())
    assert [len(content) for content in table(store, record)["prompt_embeds"].to_pylist()] == [512 * 96 * 2] * 2
    part = pq.ParquetFile(io.BytesIO(store.storage.read(job_names(record.id).part(0))))
    assert part.metadata.row_group(0).column(0).compression == "ZSTD"


def test_progress_is_told_row_by_row(chunks, make_job):
    record, watch = make_job(count=20, chunk_rows=20), Watch()
    chunks.encode(record.id, 0, watch)
    assert watch.told == list(range(1, 21))


def test_a_chunk_that_is_done_is_not_done_again(chunks, store, forwards, make_job):
    record = make_job(count=4)
    chunks.encode(record.id, 0, Watch())
    before, forwards.texts = store.report(record.id, 0), []
    ChunkEncoder(store, chunks.engine, Recall(chunks.engine, 0)).encode(record.id, 0, Watch())
    assert forwards.texts == []
    assert store.report(record.id, 0) == before


def test_a_good_part_of_a_worker_that_died_counts_without_being_encoded(chunks, store, forwards, make_job):
    record = make_job(count=4)
    chunks.encode(record.id, 0, Watch())
    before, forwards.texts = store.report(record.id, 0), []
    store.storage.delete(job_names(record.id).report(0))
    ChunkEncoder(store, chunks.engine, Recall(chunks.engine, 0)).encode(record.id, 0, Watch())
    assert forwards.texts == []
    assert store.report(record.id, 0) == before


@pytest.mark.parametrize("content", [b"", b"rubbish", None], ids=["empty", "rubbish", "missing"])
def test_a_part_that_is_damaged_or_missing_is_done_anew(chunks, store, make_job, content):
    record = make_job(count=4)
    chunks.encode(record.id, 0, Watch())
    before = table(store, record)
    if content is None:
        store.storage.delete(job_names(record.id).part(0))
    else:
        store.storage.delete(job_names(record.id).report(0))
        store.storage.write(job_names(record.id).part(0), content)
    chunks.encode(record.id, 0, Watch())
    assert table(store, record)["id"].to_pylist() == before["id"].to_pylist()
    assert finalise(store, record.id, read_all=True) == []


def test_a_chunk_that_is_stopped_leaves_nothing_and_drops_what_waits(chunks, store, engine, forwards, make_job):
    record = make_job(count=200, chunk_rows=200)

    class StoppedWhileWaiting(Watch):
        def check(self):
            if engine.waiting_rows:
                raise JobCancelledError

    with forwards.held(engine), pytest.raises(JobCancelledError):
        chunks.encode(record.id, 0, StoppedWhileWaiting())
    assert store.storage.files(job_names(record.id).parts_folder) == []
    engine.submit(["last"]).result(60)
    assert on_the_device(forwards) == ["hold", "last"]
    assert engine.waiting_rows == 0


def test_a_chunk_that_is_stopped_in_the_middle_leaves_nothing(chunks, store, make_job):
    record = make_job(count=200, chunk_rows=200)
    with pytest.raises(JobCancelledError):
        chunks.encode(record.id, 0, Watch(until=5))
    assert store.storage.files(job_names(record.id).parts_folder) == []


def test_a_chunk_that_is_stopped_at_the_very_end_does_not_count(chunks, store, make_job):
    record = make_job(count=4)
    with pytest.raises(JobCancelledError):
        chunks.encode(record.id, 0, Watch(until=4))
    assert store.storage.files(job_names(record.id).parts_folder) == []


def test_an_engine_that_is_closed_hands_the_chunk_back(store, encoder, make_job):
    record = make_job(count=4)
    with Engine(encoder) as engine:
        chunks = ChunkEncoder(store, engine, Recall(engine, 0))
    with pytest.raises(HandedBackError, match="the engine is closed"):
        chunks.encode(record.id, 0, Watch())
    assert store.storage.files(job_names(record.id).parts_folder) == []


def test_a_device_that_fails_under_a_chunk_is_told_apart_from_one_that_had_failed_before(
    store, encoder, forwards, make_job
):
    record = make_job(count=4)
    forwards.fault = lambda _texts: RuntimeError("illegal address")  # a known-good prompt fails as well
    with Engine(encoder) as engine:
        chunks = ChunkEncoder(store, engine, Recall(engine, 0))
        with pytest.raises(DeviceLostError, match="illegal address"):
            chunks.encode(record.id, 0, Watch())
        with pytest.raises(HandedBackError):
            chunks.encode(record.id, 0, Watch())
    assert store.storage.files(job_names(record.id).parts_folder) == []


def test_the_job_of_another_encoder_is_refused(chunks, store):
    record = make_foreign_job(store)
    with pytest.raises(FingerprintMismatchError, match=f"this worker runs {chunks.engine.encoder.fingerprint}"):
        chunks.encode(record.id, 0, Watch())


def test_the_chunk_of_a_job_that_was_deleted_is_an_error_of_its_own(chunks, store, make_job):
    record = make_job(count=4)
    store.delete(record.id)
    with pytest.raises(JobNotFoundError):
        chunks.encode(record.id, 0, Watch())


def test_a_prompt_that_cannot_be_encoded_is_a_row_with_an_error(chunks, store, forwards, make_job):
    forwards.fault = lambda texts: RuntimeError("no way") if "bad" in texts else None
    record = make_job(texts=["good", "bad", "fine"])
    chunks.encode(record.id, 0, Watch())
    assert table(store, record)["error"].to_pylist() == [None, "RuntimeError: no way", None]
    report = store.report(record.id, 0)
    assert (report.part.succeeded, report.part.failed) == (2, 1)
    assert [(error.index, error.error) for error in report.errors] == [(1, "RuntimeError: no way")]


@pytest.mark.parametrize("deduplicate", [True, False])
def test_a_prompt_that_fails_ends_a_job_that_is_to_fail_then_and_is_encoded_anew_on_retry(
    chunks, store, forwards, make_job, deduplicate
):
    forwards.fault = lambda texts: RuntimeError("no way") if "bad" in texts else None
    record = make_job(texts=["good", "fine", "bad", "more"], on_error="fail", deduplicate=deduplicate)
    for _ in range(2):
        with pytest.raises(PromptFailedError, match=r"^prompt 2 \(id '2'\) failed: RuntimeError: no way$"):
            chunks.encode(record.id, 0, Watch())
        assert store.storage.files(job_names(record.id).parts_folder) == []
        assert chunks.recall._under_way == {}
    forwards.fault = lambda _texts: None
    chunks.encode(record.id, 0, Watch())
    assert store.report(record.id, 0).part.failed == 0


def test_a_prompt_whose_rows_the_dtype_cannot_hold_ends_a_job_that_is_to_fail_then(
    chunks, encoder, make_job, monkeypatch
):
    record = make_job(texts=["good", "large"], on_error="fail", dtype="float16")
    forward = encoder.forward

    def large(prompts):
        packing, rows = forward(prompts)
        return packing, rows * 1e6

    monkeypatch.setattr(encoder, "forward", large)
    with pytest.raises(PromptFailedError, match=r"^prompt 0 \(id '0'\) failed: .*float16"):
        chunks.encode(record.id, 0, Watch())


def test_a_chunk_that_is_begun_starts_its_job_unless_it_is_for_another_encoder(chunks, store, make_job):
    foreign, record = make_foreign_job(store), make_job(count=4)
    with pytest.raises(FingerprintMismatchError):
        chunks.encode(foreign.id, 0, Watch())
    chunks.encode(record.id, 0, Watch())
    assert store.files(foreign.id).started is None
    assert store.files(record.id).started is not None


@pytest.mark.parametrize(("deduplicate", "times"), [(True, 1), (False, 5)])
def test_a_prompt_that_comes_again_is_encoded_once_unless_the_job_says_otherwise(
    chunks, store, forwards, make_job, deduplicate, times
):
    record = make_job(texts=["a", "b", "a", "a", "a", "a"], chunk_rows=3, deduplicate=deduplicate)
    for chunk in range(2):
        chunks.encode(record.id, chunk, Watch())
    assert on_the_device(forwards).count("a") == times
    first, _, third = own_rows(store, record)
    for rows in (third, *own_rows(store, record, 1)):
        np.testing.assert_allclose(rows, first, rtol=1e-4, atol=1e-4)


def test_a_chunk_that_waits_for_the_rows_of_one_that_is_stopped_gets_them_all_the_same(
    chunks, store, engine, encoder, forwards, make_job
):
    texts = [f"shared {n}" for n in range(8)]
    record = make_job(texts=texts * 2, chunk_rows=8)
    stop, outcome = threading.Event(), []

    class Stoppable(Watch):
        def check(self):
            if stop.is_set():
                raise JobCancelledError

    class Waiting(Watch):
        checks, waits = 0, threading.Event()

        def check(self):
            self.checks += 1
            if self.checks > 2:  # once before anything else, once before the only submission
                self.waits.set()

    def encode(chunk, watch):
        try:
            chunks.encode(record.id, chunk, watch)
        except JobCancelledError:
            outcome.append(f"{chunk} stopped")
        else:
            outcome.append(f"{chunk} done")

    with forwards.held(engine):
        first = threading.Thread(target=encode, args=(0, Stoppable()))
        first.start()
        while engine.waiting_rows == 0:
            first.join(0.01)
        second = threading.Thread(target=encode, args=(1, Waiting()))
        second.start()
        assert Waiting.waits.wait(60)
        stop.set()
        first.join(60)
    second.join(60)
    assert outcome == ["0 stopped", "1 done"]
    for rows, want in zip(own_rows(store, record, 1), encoder.encode(texts), strict=True):
        np.testing.assert_allclose(rows.reshape(want.own_rows.shape), want.own_rows, rtol=1e-4, atol=1e-4)


def test_chunks_that_are_stopped_one_after_the_other_leave_no_prompt_under_way(chunks, engine, forwards, make_job):
    record, under_way = make_job(texts=["shared"] * 2, chunk_rows=1), chunks.recall._under_way
    stop = threading.Event(), threading.Event()

    class Stoppable(Watch):
        def __init__(self, stop):
            super().__init__()
            self.checks, self._stop = 0, stop

        def check(self):
            self.checks += 1
            if self._stop.is_set():
                raise JobCancelledError

    def encode(chunk, watch):
        with pytest.raises(JobCancelledError):
            chunks.encode(record.id, chunk, watch)

    def future():
        return [pending.future for pending in under_way.values()]

    watches = [Stoppable(each) for each in stop]
    threads = [threading.Thread(target=encode, args=each) for each in enumerate(watches)]
    with forwards.held(engine):
        threads[0].start()
        wait_for(future)
        first = future()
        threads[1].start()
        wait_for(lambda: watches[1].checks > 3)  # it waits for the rows of the first
        stop[0].set()
        wait_for(lambda: future() and future() != first)  # and has the prompt submitted again
        stop[1].set()
        for thread in threads:
            thread.join(60)
        assert under_way == {}


def test_of_two_workers_with_the_same_chunk_the_first_to_finish_wins(chunks, store, engine, make_job):
    record = make_job(count=4)
    other = ChunkEncoder(store, engine, Recall(engine, 0))
    reports = []

    def overtake(rows):
        if rows == 4:
            other.encode(record.id, 0, Watch())
            reports.append(store.report(record.id, 0))

    chunks.encode(record.id, 0, Watch(on_progress=overtake))
    assert store.report(record.id, 0) == reports[0]
    assert [each.written.totals()["written_parts"] for each in (chunks, other)] == [0, 1]
    assert finalise(store, record.id, read_all=True) == []


def test_a_part_that_somebody_else_spoilt_meanwhile_is_an_error(chunks, store, make_job):
    record = make_job(count=4)

    def spoil(rows):
        if rows == 4:
            store.storage.write(job_names(record.id).part(0), b"rubbish")

    with pytest.raises(PartFormatError, match="is damaged"):
        chunks.encode(record.id, 0, Watch(on_progress=spoil))
    assert not store.has_part(record.id, 0)
    chunks.encode(record.id, 0, Watch())
    assert store.has_part(record.id, 0)


def test_too_little_space_stops_a_chunk_before_it_is_encoded(store, engine, forwards, make_job):
    record = make_job(count=4)
    chunks = ChunkEncoder(store, engine, Recall(engine, 0), reserve_bytes=2**62)
    if store.storage.free_bytes() is None:
        chunks.encode(record.id, 0, Watch())
        return
    with pytest.raises(StorageFullError, match=f"{2**62} are to stay free"):
        chunks.encode(record.id, 0, Watch())
    assert forwards.texts == []
