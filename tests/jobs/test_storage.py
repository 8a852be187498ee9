import io
import shutil
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from ulid import ULID

from jobs.errors import SettingsError, StorageError, StorageFullError
from jobs.local_storage import LocalStorage
from jobs.object_storage import ObjectStorage
from jobs.storage import open_storage
from tests.support import files_up_to, wait_for


def names(files):
    return sorted(file.name for file in files)


def test_the_url_says_which_kind_of_storage_it_is(storage, storage_url):
    assert isinstance(storage, ObjectStorage if storage_url.startswith("s3://") else LocalStorage)


def test_a_file_comes_back_as_it_was_written_last(storage):
    storage.write("a/b", b"first")
    storage.write("a/b", b"second")
    assert storage.read("a/b") == b"second"
    assert storage.size("a/b") == 6


def test_a_disk_that_fails_while_a_file_is_read_is_a_fault_of_the_storage():
    with LocalStorage(Path("/proc")).open("self/mem") as file, pytest.raises(StorageError, match="Input/output error"):
        file.read(1)  # nothing lies at address 0


def test_a_file_can_be_read_at_any_position(storage):
    content = bytes(range(256)) * 4000
    storage.write("a", content)
    with storage.open("a") as file:
        assert file.seek(-5, io.SEEK_END) == len(content) - 5
        assert file.read() == content[-5:]
        file.seek(700_000)
        file.seek(10, io.SEEK_CUR)
        assert file.read(300_000) == content[700_010:1_000_010]
        assert file.tell() == 1_000_010
        file.seek(len(content) + 1)
        assert file.read(1) == b""
    assert b"".join(storage.stream("a", 3, 600_000, piece_bytes=1000)) == content[3:600_000]
    assert b"".join(storage.stream("a", 0, 10**9)) == content


def test_what_is_not_there_is_told_apart_from_a_fault(storage):
    for look in (storage.read, storage.open, lambda name: next(storage.stream(name, 0, 1))):
        with pytest.raises(FileNotFoundError):
            look("nothing")
    assert storage.size("nothing") is None
    assert storage.last_change("nothing") is None
    assert (storage.files("nothing"), storage.folders("nothing")) == ([], [])
    storage.delete("nothing")
    storage.delete_folder("nothing")
    assert storage.remove_unfinished("nothing") == 0


@pytest.mark.parametrize("content", [b"", b"x", b"0123456789abcdef" * 2**19], ids=["empty", "small", "8 MiB"])
def test_a_new_file_appears_whole_once_its_block_has_ended(storage, content):
    with storage.new_file("a/new") as file:
        file.write(content[: len(content) // 2])
        file.write(content[len(content) // 2 :])
        file.flush()
        assert storage.size("a/new") is None
        assert storage.files("a") == []
    assert storage.read("a/new") == content


def test_nothing_is_left_of_a_new_file_whose_block_fails(storage):
    with pytest.raises(RuntimeError), storage.new_file("a/new") as file:  # noqa: PT012 - the block is what fails
        file.write(b"half")
        raise RuntimeError
    assert storage.size("a/new") is None
    assert storage.remove_unfinished("a") == 0


def test_the_first_of_many_writers_wins_and_all_others_are_told(storage):
    together, outcomes = threading.Barrier(8), []

    def write(content):
        try:
            with storage.new_file("a") as file:
                file.write(content)
                together.wait()
        except FileExistsError:
            outcomes.append(None)
        else:
            outcomes.append(content)

    threads = [threading.Thread(target=write, args=(b"%d" % n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [content for content in outcomes if content is not None]
    assert len(outcomes) == 8
    assert storage.read("a") == winner


def test_a_folder_is_listed_without_what_is_below_it(storage):
    for n in range(12):
        storage.write(f"jobs/a/{n}", b"x" * n)
    storage.write("jobs/a/parts/0", b"")
    storage.write("jobs/b/0", b"")
    storage.write("jobs/file", b"")
    assert {file.name: file.size for file in storage.files("jobs/a")} == {str(n): n for n in range(12)}
    assert sorted(storage.folders("jobs")) == ["a", "b"]
    assert storage.folders("jobs/a") == ["parts"]


def test_more_folders_than_a_page_holds_are_all_listed(storage):
    for n in range(12):
        storage.write(f"jobs/{n:02d}/x", b"")
    assert sorted(storage.folders("jobs")) == [f"{n:02d}" for n in range(12)]


def test_a_folder_has_last_changed_when_the_newest_file_anywhere_in_it_was_written(storage):
    for n in range(6):
        storage.write(f"a/{n}", b"")
    first = storage.last_change("a")
    assert abs(first - datetime.now(UTC)) < timedelta(seconds=5)

    def written_later():  # an object's time is in whole seconds
        storage.write("a/b/c", b"")
        return storage.last_change("a") > first

    wait_for(written_later)
    assert storage.last_change("a") == storage.last_change("a/b")


def test_a_file_tells_when_it_was_written(storage):
    storage.write("a/x", b"")
    (file,) = storage.files("a")
    assert abs(file.modified_at - datetime.now(UTC)) < timedelta(seconds=5)


def test_a_folder_is_deleted_with_all_below_it_and_nothing_beside_it(storage):
    for name in ("a", "ab", "b"):
        for n in range(6):
            storage.write(f"jobs/{name}/{n}", b"")
            storage.write(f"jobs/{name}/parts/{n}", b"")
    storage.delete_folder("jobs/a")
    assert sorted(storage.folders("jobs")) == ["ab", "b"]
    assert storage.last_change("jobs/a") is None
    assert (len(storage.files("jobs/ab")), len(storage.files("jobs/ab/parts"))) == (6, 6)


def test_a_deleted_file_is_gone_and_another_may_take_its_name(storage):
    with storage.new_file("a") as file:
        file.write(b"first")
    storage.delete("a")
    assert storage.size("a") is None
    with storage.new_file("a") as file:
        file.write(b"second")
    assert storage.read("a") == b"second"


@pytest.fixture(params=["folder", "s3"])
def broken(request, tmp_path):
    """A storage that cannot work: a file where the folder should be, a bucket that does not exist."""
    if request.param == "folder":
        (tmp_path / "file").touch()
        return open_storage(str(tmp_path / "file"))
    return open_storage(request.getfixturevalue("bucket").replace("bucket", "nowhere"))


def make_new_file(storage):
    with storage.new_file("a/new") as file:
        file.write(b"content")


@pytest.mark.parametrize(
    "use",
    [
        lambda storage: storage.check(),
        lambda storage: storage.write("a/b", b""),
        make_new_file,
        lambda storage: storage.files("a"),
        lambda storage: storage.folders("a"),
    ],
)
def test_a_storage_that_does_not_work_is_a_storage_error_in_one_line(broken, use):
    with pytest.raises(StorageError) as caught:
        use(broken)
    assert "\n" not in str(caught.value)


def test_an_object_store_that_nobody_answers_for_is_a_storage_error(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="s3://bucket/a/job"):
        open_storage(f"{bucket}/a").read("job")


def test_a_folder_on_a_full_disk_is_a_storage_full_error_and_keeps_nothing(tmp_path):
    storage = open_storage(str(tmp_path))
    storage.write("a/b", b"before")
    with files_up_to(1000):
        with pytest.raises(StorageFullError):
            storage.write("a/b", bytes(2000))
        with pytest.raises(StorageFullError), storage.new_file("a/new") as file:
            file.write(bytes(2000))
    assert storage.read("a/b") == b"before"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_full_disk_for_temporary_files_is_a_storage_error_too(bucket):
    storage = open_storage(f"{bucket}/{ULID()}")
    with files_up_to(1000), pytest.raises(StorageError), storage.new_file("a") as file:
        file.write(bytes(2000))
    assert storage.size("a") is None


def test_a_folder_knows_how_much_is_left_and_where_its_files_are(tmp_path):
    storage = open_storage(str(tmp_path))
    assert 0 < storage.free_bytes() <= shutil.disk_usage(tmp_path).total
    storage.write("a/b", b"x")
    assert storage.local_path("a/b").read_bytes() == b"x"


def test_a_bucket_has_no_limit_that_could_be_known_and_no_files_here(bucket):
    storage = open_storage(bucket)
    assert storage.free_bytes() is None
    assert storage.local_path("a") is None


def test_an_object_is_fetched_by_its_signed_url_for_a_while(bucket):
    storage = open_storage(f"{bucket}/{ULID()}")
    storage.write("a", b"x")
    url = storage.signed_url("a", 60)
    assert "X-Amz-Expires=60" in url
    assert httpx.get(url).content == b"x"


def test_a_folder_has_no_signed_urls(tmp_path):
    assert open_storage(str(tmp_path)).signed_url("a", 60) is None


def test_a_store_without_conditional_writes_keeps_the_file_that_is_there_as_well(bucket, monkeypatch):
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    storage = open_storage(f"{bucket}/{ULID()}")
    with storage.new_file("a") as file:
        file.write(b"first")
    with pytest.raises(FileExistsError), storage.new_file("a") as file:
        file.write(b"second")
    assert storage.read("a") == b"first"


@pytest.mark.parametrize("url", ["s3://", "gs://"])
def test_a_url_without_a_bucket_is_a_settings_error_that_names_it_in_one_line(url):
    with pytest.raises(SettingsError, match=f"LAYERSTACK_STORAGE='{url}'") as caught:
        open_storage(url)
    assert "\n" not in str(caught.value)


def test_the_package_for_object_stores_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, "jobs.object_storage", raising=False)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(SettingsError, match="needs the package obstore"):
        open_storage("s3://bucket")
