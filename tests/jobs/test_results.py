import hashlib
import io
import threading

import pytest

from jobs.errors import JobNotFoundError, PartFormatError, StorageError
from jobs.layout import job_names
from jobs.parts import MAX_LISTED_ERRORS
from jobs.records import JobStatus
from jobs.results import DigestingFile, FinaliseStoppedError, Verified, finalise, inspect_part
from tests.sample_jobs import do_chunk, make_job, write_part


@pytest.fixture
def record(store):
    """A job of three parts that all count; rows 5 and 9 have failed."""
    made = make_job(store)
    for chunk in range(3):
        do_chunk(store, made, chunk, bad={5, 9})
    return made


def make_done(store):
    """A job of one part that counts."""
    made = make_job(store, count=1)
    do_chunk(store, made, 0)
    return made


def part_name(record, chunk=1):
    return job_names(record.id).part(chunk)


def damage(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_the_manifest_lists_every_part_with_its_digest_and_every_row_that_failed(store, record):
    assert finalise(store, record.id, read_all=True) == []
    manifest = store.manifest(record.id)
    counts = (manifest.rows, manifest.succeeded, manifest.failed, manifest.truncated, manifest.tokens)
    assert counts == (10, 8, 2, 1, 24)
    assert [(error.index, error.id, error.error) for error in manifest.errors] == [(5, "id5", "bad"), (9, "id9", "bad")]
    assert [part.index for part in manifest.parts] == [0, 1, 2]
    for part in manifest.parts:
        content = store.storage.read(part_name(record, part.index))
        assert (part.bytes, part.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert manifest.bytes == sum(part.bytes for part in manifest.parts)
    assert (manifest.job_id, manifest.fingerprint) == (record.id, record.fingerprint)


def test_a_manifest_lists_only_the_first_of_very_many_rows_that_failed(store):
    count = MAX_LISTED_ERRORS + 2
    record = make_job(store, count, chunk_rows=count // 2)
    for chunk in range(2):
        do_chunk(store, record, chunk, bad=range(count))
    finalise(store, record.id, read_all=True)
    manifest = store.manifest(record.id)
    assert (manifest.failed, len(manifest.errors)) == (count, MAX_LISTED_ERRORS)
    assert [error.index for error in manifest.errors] == list(range(MAX_LISTED_ERRORS))


def test_finishing_twice_changes_nothing(store, record):
    finalise(store, record.id, read_all=True)
    first = store.manifest(record.id)
    store.storage.delete(part_name(record))
    assert finalise(store, record.id, read_all=True) == []
    assert store.manifest(record.id) == first


FAULTS = {
    "a damaged byte in the middle": lambda store, record: store.storage.write(
        part_name(record), damage(store.storage.read(part_name(record)))
    ),
    "truncated": lambda store, record: store.storage.write(
        part_name(record), store.storage.read(part_name(record))[:-10]
    ),
    "empty": lambda store, record: store.storage.write(part_name(record), b""),
    "missing": lambda store, record: store.storage.delete(part_name(record)),
    "another part": lambda store, record: store.storage.write(
        part_name(record), store.storage.read(part_name(record, 0))
    ),
    "report missing": lambda store, record: store.storage.delete(job_names(record.id).report(1)),
    "report damaged": lambda store, record: store.storage.write(job_names(record.id).report(1), b"{"),
    "report of another part": lambda store, record: store.storage.write(
        job_names(record.id).report(1), store.storage.read(job_names(record.id).report(0))
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_part_that_is_not_what_its_report_says_is_deleted_and_its_chunk_named(store, record, fault):
    fault(store, record)
    assert finalise(store, record.id, read_all=True) == [1]
    assert store.files(record.id).status() == JobStatus.RUNNING
    assert not store.has_part(record.id, 1)
    assert store.storage.size(part_name(record)) is None
    do_chunk(store, record, 1)
    assert finalise(store, record.id, read_all=True) == []
    assert store.manifest(record.id).rows == 10


def test_all_bad_parts_are_named_at_once(store, record):
    for chunk in (0, 2):
        store.storage.write(part_name(record, chunk), b"rubbish")
    assert finalise(store, record.id, read_all=True) == [0, 2]


@pytest.mark.parametrize("header", [{"fingerprint": "f"}, {"dtype": "float16"}, {"layout": "dense"}])
def test_a_part_that_was_made_otherwise_than_the_job_asks_is_not_taken(store, record, header):
    store.discard_part(record.id, 1)
    store.count_part(record.id, write_part(store, record, 1, **header))
    assert finalise(store, record.id, read_all=False) == [1]


def test_only_footers_are_read_if_that_is_enough(store, record):
    FAULTS["a damaged byte in the middle"](store, record)
    assert finalise(store, record.id, read_all=False) == []
    assert store.files(record.id).status() == JobStatus.SUCCEEDED


@pytest.mark.parametrize("fault", ["truncated", "empty", "missing", "another part", "report missing", "report damaged"])
def test_what_a_footer_tells_is_found_without_reading_all(store, record, fault):
    FAULTS[fault](store, record)
    assert finalise(store, record.id, read_all=False) == [1]


def test_one_who_stops_leaves_everything_as_it_was(store, record):
    store.storage.write(part_name(record), b"rubbish")
    with pytest.raises(FinaliseStoppedError):
        finalise(store, record.id, read_all=True, should_stop=lambda: True)
    assert store.storage.read(part_name(record)) == b"rubbish"
    assert len(store.files(record.id).parts) == 3
    assert store.files(record.id).manifest is None


class Unreadable(io.BytesIO):
    def read(self, _size=-1):
        raise StorageError("the disk failed")


@pytest.fixture
def failing(store, monkeypatch):
    """Have a file of the storage fail while it is read, not when it is opened -> the names of files that are opened."""
    opened, really_open = [], store.storage.open

    def fail(name):
        def open_(asked):
            opened.append(asked)
            return Unreadable(store.storage.read(name)) if asked == name else really_open(asked)

        monkeypatch.setattr(store.storage, "open", open_)
        return opened

    return fail


def test_a_part_that_cannot_be_read_now_is_not_taken_for_damaged(store, record, failing):
    failing(part_name(record))
    with pytest.raises(StorageError):
        finalise(store, record.id, read_all=True)
    with pytest.raises(StorageError):
        inspect_part(store, record.id, 1)
    assert len(store.files(record.id).parts) == 3


def test_what_was_found_good_before_the_storage_failed_is_not_read_again(store, record, failing):
    verified = Verified()
    failing(part_name(record, 2))
    with pytest.raises(StorageError):
        finalise(store, record.id, read_all=True, verified=verified)
    opened = failing("none")
    opened.clear()
    assert finalise(store, record.id, read_all=True, verified=verified) == []
    assert set(opened) == {part_name(record, 2)}
    assert [error.index for error in store.manifest(record.id).errors] == [5, 9]


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_bad_part_that_others_have_done_anew_meanwhile_stays(store, record, is_finished):
    store.storage.write(part_name(record), b"rubbish")
    asked = []

    def others_are_faster():
        if threading.current_thread() is threading.main_thread() and not asked:  # all parts have been read
            asked.append(True)
            store.discard_part(record.id, 1)
            do_chunk(store, record, 1)
            if is_finished:
                finalise(store, record.id, read_all=True)
        return False

    assert finalise(store, record.id, read_all=True, should_stop=others_are_faster) == []
    assert store.has_part(record.id, 1)


def test_one_who_stops_need_not_wait_for_the_end_of_a_part(store):
    answers = iter([False, True])  # before the part, and within it
    with pytest.raises(FinaliseStoppedError):
        finalise(store, make_done(store).id, read_all=True, should_stop=lambda: next(answers))


def test_an_unknown_job_cannot_be_finished(store):
    with pytest.raises(JobNotFoundError):
        finalise(store, "01M8259KQ6ZM43ZW7F9E4YQJWV", read_all=True)


def test_a_part_that_nobody_vouched_for_is_counted_as_its_writer_would_have(store):
    record = make_job(store)
    written = write_part(store, record, 1, bad={5})
    assert inspect_part(store, record.id, 1) == written
    assert (written.part.rows, written.part.failed, written.part.tokens) == (4, 1, 9)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"rubbish" * 100])
def test_a_damaged_part_that_nobody_vouched_for_is_an_error_that_names_it(store, content):
    record = make_job(store)
    store.storage.write(part_name(record), content)
    with pytest.raises(PartFormatError, match=part_name(record)):
        inspect_part(store, record.id, 1)


def test_a_part_with_too_few_rows_or_of_another_encoder_is_an_error(store):
    record = make_job(store)
    write_part(store, record, 1)
    store.storage.write(part_name(record, 2), store.storage.read(part_name(record, 1)))
    with pytest.raises(PartFormatError, match="has 4 rows, its chunk has 2"):
        inspect_part(store, record.id, 2)
    write_part(store, record, 0, fingerprint="f" * 16)
    with pytest.raises(PartFormatError, match="was made by the encoder f"):
        inspect_part(store, record.id, 0)


def test_a_part_that_is_not_there_is_told_apart_from_a_damaged_one(store):
    with pytest.raises(FileNotFoundError):
        inspect_part(store, make_job(store).id, 0)


def test_what_is_written_is_digested_on_the_way():
    sink = io.BytesIO()
    file = DigestingFile(sink)
    for piece in (b"abc", memoryview(b"defg"), bytearray(b"")):
        assert file.write(piece) == len(piece)
    assert (file.size, sink.getvalue()) == (7, b"abcdefg")
    assert file.sha256 == hashlib.sha256(b"abcdefg").hexdigest()
    assert (file.writable(), file.seekable()) == (True, False)
