import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from jobs.progress import NOTHING_LIVE, Counts, JobFiles, Live
from jobs.rate import Reported
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
    nothing = {"parts": {}, "failures": {}, "manifest": None, "started": None, "cancelled": None, "expired": None}
    return JobFiles(record=RECORD, starts=[0, 4, 8, 10], **nothing | files)


@pytest.mark.parametrize(
    ("files", "live", "status"),
    [
        ({}, NOTHING_LIVE, "queued"),
        ({}, Live({1: 0}), "running"),
        ({"parts": {0: 1}}, NOTHING_LIVE, "running"),
        ({"started": MARK}, NOTHING_LIVE, "running"),
        ({"started": MARK}, FULL, "paused"),
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
    assert [(part.index, part.rows, part.bytes, part.url) for part in shown] == [
        (0, 4, 100, f"/jobs/{RECORD.id}/parts/0"), (2, 2, 102, f"/jobs/{RECORD.id}/parts/2"),
    ]  # fmt: skip
    assert job(manifest=MANIFEST, expired=MARK, **DONE).view().parts == []


def test_the_first_failure_is_told_with_the_number_of_others():
    view = job(failures=failures(2, 1), parts={0: 1}).view()
    assert view.error == "chunk 1, after 3 attempts: fault 1 (and 1 more chunks)"
    assert view.num_parts_failed == 2
    assert job(failures=failures(1)).view().error == "chunk 1, after 3 attempts: fault 1"
    once = failure(1).model_copy(update={"attempts": 1, "crashes": 0})
    assert job(failures={1: once}).view().error == "chunk 1, after 1 attempt: fault 1"


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


def test_with_fail_on_error_the_first_chunk_that_is_given_up_ends_the_job():
    impatient = RECORD.model_copy(update={"on_error": "fail"})

    def status(**files):
        return replace(job(**files), record=impatient).status(Live({2: 1}))

    assert status(failures=failures(1)) == JobStatus.FAILED
    assert status(failures=failures(1, gave_up=False)) == JobStatus.RUNNING
    assert status(failures=failures(1), parts={1: 1}) == JobStatus.RUNNING
    assert status(failures=failures(1), cancelled=MARK) == JobStatus.CANCELLING
    view = replace(job(failures=failures(1), parts={0: 1}), record=impatient).view(Live({2: 1}))
    assert (view.num_done, view.finished_at, view.options.on_error) == (4, NOW + timedelta(minutes=1), "fail")


def times(view):
    return {name: at for name, at in view.times.model_dump().items() if at is not None}


def test_each_state_that_was_reached_has_its_time():
    began, stopped, over = (Mark(at=NOW + timedelta(hours=n)) for n in (1, 2, 3))
    queued, running = {"queued": NOW}, {"queued": NOW, "running": began.at}
    assert times(job().view()) == queued
    assert times(job(started=began).view()) == running
    assert job(started=began).view().started_at == began.at
    stopping = running | {"cancelling": stopped.at}
    assert times(job(started=began, cancelled=stopped).view(Live({1: 1}))) == stopping
    assert times(job(started=began, cancelled=stopped).view()) == stopping | {"cancelled": stopped.at}
    assert times(job(cancelled=stopped, expired=over).view()) == queued | {
        "cancelling": stopped.at, "cancelled": stopped.at, "expired": over.at,
    }  # fmt: skip
    assert times(job(manifest=MANIFEST, **DONE).view()) == queued | {"succeeded": MANIFEST.finished_at}
    late = job(manifest=MANIFEST, cancelled=stopped, **DONE).view()  # the mark came too late
    assert times(late) == queued | {"cancelling": stopped.at, "succeeded": MANIFEST.finished_at}
    failed = job(failures=failures(1), parts={0: 1, 2: 1}).view()
    assert times(failed) == queued | {"failed": NOW + timedelta(minutes=1)}


def test_counts_are_those_of_the_manifest_if_there_is_one_and_else_what_is_known():
    def shown(view):
        return (view.num_succeeded, view.num_failed, view.num_truncated)

    known = Counts(3, 1, 2)
    assert shown(job(parts={0: 1}).view()) == (None, None, None)
    assert shown(job(parts={0: 1}).view(counts=known)) == (3, 1, 2)
    assert shown(job(manifest=MANIFEST, **DONE).view(counts=known)) == (8, 2, 1)


def test_the_rate_and_the_time_left_follow_from_the_last_parts_while_it_runs():
    reported = [Reported(NOW, 4), Reported(NOW + timedelta(seconds=2), 4)]
    view = job(parts={0: 1, 1: 1}, reported=reported).view()
    assert (view.rate, view.eta_s) == (2.0, 1.0)
    for files, live in (({"cancelled": MARK}, NOTHING_LIVE), ({}, FULL), (DONE | {"manifest": MANIFEST}, NOTHING_LIVE)):
        view = job(reported=reported, **{"parts": {0: 1, 1: 1}} | files).view(live)
        assert (view.rate, view.eta_s) == (None, None)


def test_before_there_are_two_parts_the_rate_is_what_has_been_done_since_it_started():
    def rate(live=NOTHING_LIVE, seconds=2, **files):
        return job(started=MARK, **files).view(live, now=NOW + timedelta(seconds=seconds)).rate

    assert rate() is None
    assert rate(Live({0: 3})) == 1.5
    assert rate(Live({1: 1}), parts={0: 1}, reported=[Reported(NOW, 4)]) == 2.5
    assert rate(Live({0: 3}), seconds=-1) is None  # the clocks differ
    assert job().view(Live({0: 3})).rate is None  # a job that began before there was a mark


def test_the_first_parts_count_from_when_the_job_started_since_they_end_at_nearly_the_same_moment():
    reported = [Reported(NOW + timedelta(seconds=4), 4), Reported(NOW + timedelta(seconds=4.1), 4)]
    first_two = job(started=MARK, parts={0: 1, 1: 1}, reported=reported)
    assert first_two.view().rate == pytest.approx(8 / 4.1)
    later = replace(first_two, parts={0: 1, 1: 1, 2: 1})  # a part was reported before these
    assert later.view().rate == pytest.approx(4 / 0.1)


def test_a_job_that_is_done_but_for_the_check_of_its_parts_has_no_time_left():
    reported = [Reported(NOW, 4), Reported(NOW + timedelta(seconds=2), 4)]
    assert job(reported=reported, **DONE).view().eta_s == 0


def test_the_position_in_the_queue_is_shown_while_it_is_queued():
    assert job().view(Live({}, None, 3)).queue_position == 3
    assert job(started=MARK).view(Live({}, None, 3)).queue_position is None


@pytest.mark.parametrize(
    ("after", "limit", "shown", "following"),
    [
        (None, 100, [0, 2, 3, 7], None),
        (None, 2, [0, 2], 2),
        (2, 2, [3, 7], None),
        (0, 1, [2], 2),
        (1, 4, [2, 3, 7], None),
        (7, 4, [], None),
        (-1, 4, [0, 2, 3, 7], None),
        (None, 0, [], None),
    ],
)
def test_parts_are_shown_in_pages(after, limit, shown, following):
    record = RECORD.model_copy(update={"num_chunks": 9, "num_prompts": 9})
    files = replace(job(parts=dict.fromkeys([7, 3, 0, 2], 1)), record=record, starts=range(10))
    view = files.view(parts_after=after, parts_limit=limit)
    assert ([part.index for part in view.parts], view.parts_next) == (shown, following)
    assert view.num_parts_done == 4
