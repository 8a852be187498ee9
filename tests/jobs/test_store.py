import hashlib

import numpy as np
import pytest

from jobs.errors import JobNotFoundError, NoPromptsError, PartFormatError, PartNotFoundError, PartNotReadyError
from jobs.parts import EncodedRow, PartHeader, PartWriter
from jobs.records import JobOptions, JobStatus, Prompt


def make(store, info, count=10, **options):
    return store.create(
        (Prompt(id=f"id{n}", prompt=f"prompt {n}") for n in range(count)),
        options=JobOptions(**options),
        encoder=info,
        default_chunk_rows=4,
        metadata={"k": "v"},
    )


def encode(store, record, chunk, bad=()):
    head = PartHeader.build(
        layout="own_rows", dtype="float32", max_length=16, fingerprint=record.fingerprint, layers=(1, 2),
        prefix_rows=np.zeros((2, 4), np.float32), pad_row=np.zeros(4, np.float32),
    )  # fmt: skip
    with store.new_part(record.id, chunk) as file, PartWriter(file, head, "none") as part:
        for index, prompt in store.prompts(record.id, chunk):
            if index in bad:
                part.write(EncodedRow(index, prompt.id, prompt.prompt, error="bad"))
            else:
                part.write(EncodedRow(index, prompt.id, prompt.prompt, np.ones((1, 4), np.float32), 3, index == 0))


def test_a_job_keeps_its_prompts_in_order_in_chunks(store, info):
    record = make(store, info)
    assert (record.num_prompts, record.num_chunks, record.metadata) == (10, 3, {"k": "v"})
    stored = [pair for chunk in range(3) for pair in store.prompts(record.id, chunk)]
    assert stored == [(n, Prompt(id=f"id{n}", prompt=f"prompt {n}")) for n in range(10)]
    assert store.load(record.id) == record


def test_options_default_to_the_encoder_and_the_server(store, info):
    default, chosen = make(store, info), make(store, info, dtype="bfloat16", layout="dense", chunk_rows=7)
    assert (default.dtype, default.layout, default.chunk_rows) == ("float32", "own_rows", 4)
    assert (chosen.dtype, chosen.layout, chosen.chunk_rows, chosen.num_chunks) == ("bfloat16", "dense", 7, 2)


def test_the_status_follows_from_the_files(store, info):
    record = make(store, info)
    assert store.view(record.id).status == JobStatus.QUEUED
    assert store.view(record.id, {0: 2}).status == JobStatus.RUNNING
    encode(store, record, 1)
    view = store.view(record.id, {0: 2, 1: 4})
    assert (view.status, view.num_done, view.num_parts_done) == (JobStatus.RUNNING, 6, 1)
    assert [part.index for part in view.parts] == [1]
    assert store.finalise(record.id) is None
    encode(store, record, 0)
    encode(store, record, 2)
    assert store.view(record.id).status == JobStatus.RUNNING
    assert store.finalise(record.id) is not None
    view = store.view(record.id)
    assert (view.status, view.num_done, view.num_failed, view.num_truncated) == (JobStatus.SUCCEEDED, 10, 0, 1)
    assert view.finished_at is not None


def test_the_manifest_lists_every_part_with_its_digest_and_every_row_that_failed(store, info):
    record = make(store, info)
    for chunk in range(3):
        encode(store, record, chunk, bad={5, 9})
    manifest = store.finalise(record.id)
    assert (manifest.rows, manifest.succeeded, manifest.failed, manifest.truncated, manifest.tokens) == (
        10,
        8,
        2,
        1,
        24,
    )
    assert [(error.index, error.id, error.error) for error in manifest.errors] == [(5, "id5", "bad"), (9, "id9", "bad")]
    for part in manifest.parts:
        content = store.part_path(record.id, part.index).read_bytes()
        assert (part.bytes, part.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert manifest.bytes == sum(part.bytes for part in manifest.parts)


def test_finishing_twice_keeps_the_first_manifest(store, info):
    record = make(store, info, count=1)
    encode(store, record, 0)
    assert store.finalise(record.id) == store.finalise(record.id)


def test_a_chunk_fails_its_job_once_its_attempts_are_used_up(store, info):
    record = make(store, info)
    assert not store.record_failure(record.id, 1, "first", 2).gave_up
    assert store.view(record.id).status == JobStatus.QUEUED
    assert store.record_failure(record.id, 1, "second", 2).gave_up
    view = store.view(record.id)
    assert view.status == JobStatus.FAILED
    assert view.error == "chunk 1, after 2 attempts: second"
    for chunk in range(3):
        encode(store, record, chunk)
    store.finalise(record.id)
    assert store.view(record.id).status == JobStatus.SUCCEEDED


def test_a_part_that_is_found_damaged_at_the_end_fails_the_job_by_name(store, info):
    record = make(store, info, count=4)
    encode(store, record, 0)
    store.part_path(record.id, 0).write_bytes(b"damaged")
    with pytest.raises(PartFormatError, match=r"00000\.parquet is damaged") as caught:
        store.finalise(record.id)
    store.record_failure(record.id, 0, str(caught.value), 1)
    view = store.view(record.id)
    assert view.status == JobStatus.FAILED
    assert "00000.parquet is damaged" in view.error


def test_a_part_appears_whole_or_not_at_all(store, info, tmp_path):
    record = make(store, info)
    with pytest.raises(RuntimeError), store.new_part(record.id, 0) as file:  # noqa: PT012 - the block is what fails
        file.write(b"half a part")
        raise RuntimeError
    assert not store.has_part(record.id, 0)
    assert list((tmp_path / "jobs" / record.id / "parts").iterdir()) == []


def test_the_first_of_two_that_write_a_part_wins(store, info):
    record = make(store, info)
    with store.new_part(record.id, 0) as slow:
        slow.write(b"late")
        with store.new_part(record.id, 0) as fast:
            fast.write(b"first")
    assert store.part_path(record.id, 0).read_bytes() == b"first"


@pytest.mark.parametrize("fault", [NoPromptsError, ValueError])
def test_a_job_whose_prompts_cannot_be_read_leaves_nothing_behind(store, info, tmp_path, fault):
    def prompts():
        if fault is ValueError:
            yield from [Prompt(id="a", prompt="a")] * 9
            raise ValueError

    with pytest.raises(fault):
        store.create(prompts(), options=JobOptions(), encoder=info, default_chunk_rows=4, metadata={})
    assert not list((tmp_path / "jobs").glob("*"))


def test_jobs_are_listed_newest_first_in_pages(store, info, tmp_path):
    ids = [make(store, info, count=1).id for _ in range(5)]
    (tmp_path / "jobs" / "not-a-job").mkdir()
    (tmp_path / "jobs" / "01M8259KQ6ZM43ZW7F9E4YQJWV").mkdir()  # an upload that never ended
    newest_first = sorted(ids, reverse=True)
    assert store.list_ids(limit=10) == newest_first
    assert store.list_ids(limit=2) == newest_first[:2]
    assert store.list_ids(limit=2, after=newest_first[1]) == newest_first[2:4]


@pytest.mark.parametrize("job_id", ["", "..", "../..", "01M8259KQ6ZM43ZW7F9E4YQJWV", "01M8259KQ6ZM43ZW7F9E4YQJW\n"])
def test_an_unknown_job_is_an_error_and_no_path_is_made_of_its_id(store, job_id):
    for call in (store.load, store.view, store.finalise, store.manifest, store.remove):
        with pytest.raises(JobNotFoundError):
            call(job_id)


def test_a_part_that_is_not_there_yet_tells_the_status_of_its_job(store, info):
    record = make(store, info)
    with pytest.raises(PartNotReadyError, match=r"part 0 .* not there yet: the job is queued"):
        store.part_path(record.id, 0)
    for number in (3, -1, 10**300):
        with pytest.raises(PartNotFoundError, match=f"has no part {number}: its parts are 0 to 2"):
            store.part_path(record.id, number)
    with pytest.raises(PartNotReadyError, match="no results yet: it is queued"):
        store.manifest(record.id)


def test_a_removed_job_is_gone(store, info, tmp_path):
    record = make(store, info)
    store.remove(record.id)
    assert list((tmp_path / "jobs").iterdir()) == []
