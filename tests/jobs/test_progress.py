import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from jobs.progress import NOTHING_LIVE, JobFiles, Live
from jobs.records import MAX_CHUNK_TOKENS, ChunkFailure, JobRecord, JobStatus, JobView, Manifest, Mark

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RECORD = JobRecord(
    id="01M8259KQ6ZM43ZW7F9E4YQJWV", created_at=NOW, num_prompts=10, num_chunks=3, chunk_rows=4, chunk_tokens=100,
    deduplicate=True, estimated_bytes=77, dtype="float32", layout="own_rows", compression="none", fingerprint="f",
    metadata={"k": "v"},
)  # fmt: skip
MANIFEST = Manifest(
    job_id=RECORD.id, fingerprint="f", finished_at=NOW, rows=10, bytes=9, succeeded=8, failed=2, truncated=1, tokens=30,
    parts=[], errors=[],
)  # fmt: skip
DONE = {"parts": {0: 100, 1: 101, 2: 102}}
MARK = Mark(at=NOW)
FULL = Live({}, "the storage is full")


def failure(chunk, *, gave_up=True, minutes=0):
    at = NOW + timedelta(minutes=minutes)
    return ChunkFailure(chunk=chunk, attempts=2, crashes=1, gave_up=gave_up, error=f"fault {chunk}", failed_at=at)


def failures(*chunks, gave_up=True):
    return {chunk: failure(chunk, gave_up=gave_up, minutes=chunk) for chunk in chunks}


def job(**files):
    nothing = {"parts": {}, "failures": {}, "manifest": None, "cancelled": None, "expired": None}
    return JobFiles(record=RECORD, starts=[0, 4, 8, 10], **nothing | files)


@pytest.mark.parametrize(
    ("files", "live", "status"),
    [
        ({}, NOTHING_LIVE, "queued"),
        ({}, Live({1: 0}), "running"),
        ({"parts": {0: 1}}, NOTHING_LIVE, "running"),
        ({"failures": failures(1, gave_up=False)}, NOTHING_LIVE, "queued"),
        (DONE, NOTHING_LIVE, "running"),  # until the parts have been checked
        ({}, FULL, "paused"),
        ({"parts": {0: 1}}, FULL, "paused"),
        ({}, Live({1: 3}, "the storage is full"), "paused"),
        (DONE | {"manifest": MANIFEST}, FULL, "succeeded"),
        ({"failures": failures(1)}, NOTHING_LIVE, "queued"),  # the others have yet to be done
        ({"failures": failures(1), "parts": {0: 1}}, NOTHING_LIVE, "running"),
        ({"failures": failures(1), "parts": {0: 1, 2: 1}}, NOTHING_LIVE, "failed"),
        ({"failures": failures(1), "parts": {0: 1, 2: 1}}, FULL, "failed"),
        ({"failures": failures(0, 1, 2)}, NOTHING_LIVE, "failed"),
        ({"failures": failures(0, 1), "parts": {0: 1, 2: 1}}, NOTHING_LIVE, "failed"),
        ({"failures": failures(1)} | DONE, NOTHING_LIVE, "running"),  # done after all
        ({"failures": failures(1)} | DONE | {"manifest": MANIFEST}, NOTHING_LIVE, "succeeded"),
        ({"cancelled": MARK}, NOTHING_LIVE, "cancelled"),
        ({"cancelled": MARK, "parts": {0: 1}}, FULL, "cancelled"),
        ({"cancelled": MARK}, Live({1: 3}), "cancelling"),
        ({"cancelled": MARK, "parts": {1: 1}}, Live({1: 3}), "cancelled"),  # what is told of a part is past
        ({"cancelled": MARK} | DONE | {"manifest": MANIFEST}, NOTHING_LIVE, "succeeded"),
        ({"cancelled": MARK, "failures": failures(1), "parts": {0: 1, 2: 1}}, NOTHING_LIVE, "cancelled"),
        ({"expired": MARK, "manifest": MANIFEST}, NOTHING_LIVE, "expired"),
        ({"expired": MARK, "cancelled": MARK}, Live({1: 3}), "expired"),
    ],
)
def test_the_status_follows_from_the_files_and_what_is_live(files, live, status):
    assert job(**files).status(live) == JobStatus(status)
    assert job(**files).view(live).status == JobStatus(status)


def test_the_statuses_that_nothing_more_happens_in_are_final():
    final = {status for status in JobStatus if status.is_final}
    assert final == {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED}


@pytest.mark.parametrize(
    ("files", "finished_at"),
    [
        ({}, None),
        ({"parts": {0: 1}}, None),
        ({"manifest": MANIFEST}, NOW),
        ({"failures": failures(1, 2), "parts": {0: 1}}, NOW + timedelta(minutes=2)),
        ({"cancelled": MARK}, NOW),
        ({"expired": MARK}, NOW),
    ],
)
def test_a_job_has_finished_when_it_came_into_its_final_status(files, finished_at):
    assert job(**files).view().finished_at == finished_at


def test_a_job_that_is_being_cancelled_has_not_finished():
    assert job(cancelled=MARK).view(Live({1: 3})).finished_at is None


def test_prompts_of_parts_and_of_chunks_under_way_are_counted_once():
    view = job(parts={1: 100}).view(Live({0: 3, 1: 4, 2: 99, 7: 1}))
    assert (view.num_prompts, view.num_done, view.num_parts, view.num_parts_done) == (10, 4 + 3 + 2, 3, 1)


def test_in_a_final_status_only_parts_count():
    view = job(manifest=MANIFEST, **DONE).view(Live({0: 3}))
    assert (view.num_done, view.num_failed, view.num_truncated) == (10, 2, 1)
    assert job(expired=MARK, parts={0: 1}).view(Live({2: 1})).num_done == 4


def test_parts_are_shown_with_their_sizes_in_order_until_they_expire():
    shown = job(parts={2: 102, 0: 100}).view().parts
    assert [(part.index, part.bytes, part.url) for part in shown] == [
        (0, 100, f"/jobs/{RECORD.id}/parts/0"), (2, 102, f"/jobs/{RECORD.id}/parts/2"),
    ]  # fmt: skip
    assert job(manifest=MANIFEST, expired=MARK, **DONE).view().parts == []


def test_the_first_failure_is_told_with_the_number_of_others():
    view = job(failures=failures(2, 1), parts={0: 1}).view()
    assert view.error == "chunk 1, after 3 attempts: fault 1 (and 1 more chunks)"
    assert view.num_parts_failed == 2
    assert job(failures=failures(1)).view().error == "chunk 1, after 3 attempts: fault 1"


def test_a_failure_that_is_being_tried_again_or_was_overcome_is_not_told():
    assert job(failures=failures(1, gave_up=False)).view().error is None
    assert job(failures=failures(1), manifest=MANIFEST, **DONE).view().error is None


def test_a_job_that_waits_tells_why():
    assert job(failures=failures(1)).view(FULL).error == "the storage is full"
    assert job().view(Live({}, None)).error is None


def test_a_job_that_was_made_under_other_limits_is_shown_all_the_same():
    record = RECORD.model_copy(update={"chunk_tokens": MAX_CHUNK_TOKENS + 1})
    assert replace(job(), record=record).view().options.chunk_tokens == MAX_CHUNK_TOKENS + 1


def test_a_reader_ignores_what_a_later_version_adds():
    shown = json.loads(job().view().model_dump_json())
    shown["more"] = shown["options"]["more"] = 1
    assert JobView.model_validate(shown) == job().view()


def test_what_was_asked_is_shown():
    view = job().view()
    assert (view.estimated_bytes, view.fingerprint, view.metadata) == (77, "f", {"k": "v"})
    assert (view.options.chunk_rows, view.options.chunk_tokens, view.options.deduplicate) == (4, 100, True)
