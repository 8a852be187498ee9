import errno
import hashlib
import subprocess
import sys

import pytest

from jobs.files import remove_unfinished, sha256_of, written_whole

# Begins a file and tells so; ends it when it is asked to.
WRITER = """
import sys
from pathlib import Path
from jobs.files import written_whole
with written_whole(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("begun", flush=True)
    sys.stdin.readline()
    file.write(b" and half")
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is in the middle of writing `tmp_path / "file"`."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"begun\n"
        yield process
        process.kill()


def test_what_a_living_writer_has_begun_stays_and_ends_as_a_file(writer, tmp_path):
    assert remove_unfinished(tmp_path) == 0
    writer.communicate(b"\n")
    assert writer.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"half and half"


def test_what_a_killed_writer_has_begun_is_removed_and_nothing_else(writer, tmp_path):
    (tmp_path / ".hidden").touch()
    (tmp_path / "whole.tmp").touch()
    writer.kill()
    writer.wait()
    assert len(list(tmp_path.iterdir())) == 3
    assert remove_unfinished(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "whole.tmp"]


def test_a_writer_of_the_same_process_counts_as_living_too(tmp_path):
    with written_whole(tmp_path / "file") as file:
        file.write(b"x")
        assert remove_unfinished(tmp_path) == 0
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    with written_whole(path) as file:
        file.write(b"first")
    with pytest.raises(RuntimeError), written_whole(path) as file:  # noqa: PT012 - the block is what fails
        file.write(b"half of the second")
        raise RuntimeError
    assert path.read_bytes() == b"first"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_others_may_read_what_we_wrote(tmp_path):
    with written_whole(tmp_path / "file"):
        pass
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


@pytest.fixture(params=[True, False], ids=["links", "no links"])
def links(request, monkeypatch):
    """File systems with and without hard links."""
    if not request.param:

        def refused(path, _target):
            raise OSError(errno.EPERM, "no links here", str(path))

        monkeypatch.setattr("pathlib.Path.hardlink_to", refused)


@pytest.mark.usefixtures("links")
def test_a_file_that_is_there_stays_if_it_is_to_be_kept(tmp_path):
    with written_whole(tmp_path / "file", keep_existing=True) as file:
        file.write(b"first")
    with pytest.raises(FileExistsError), written_whole(tmp_path / "file", keep_existing=True) as file:
        file.write(b"second")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_where_a_folder_is_needed_is_not_taken_for_the_file_that_is_there(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), written_whole(tmp_path / "file" / "x", keep_existing=True):
        pass


def test_the_digest_is_sha_256(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()
