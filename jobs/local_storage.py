"""Storage in a local folder, or one that many machines mount."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from jobs.errors import StorageError, StorageFullError
from jobs.files import NO_ROOM, remove_unfinished, sync_folder, written_whole
from jobs.storage import Storage, StoredFile

# Somebody may be writing into a folder while it is deleted.
_DELETE_ATTEMPTS = 10
_BUFFER_BYTES = 2**18


class LocalStorage(Storage):
    """Files under a folder; each is written under a temporary name, synced and renamed."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()

    def check(self) -> None:
        """Make the folder if need be, and find out whether it can be written to."""
        with _translated(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            if not os.access(self.root, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.root))

    def read(self, name: str) -> bytes:
        """Return a file's content."""
        with _translated(self._path(name), FileNotFoundError):
            return self._path(name).read_bytes()

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading at any position."""
        with _translated(self._path(name), FileNotFoundError):
            return io.BufferedReader(_Reading(self._path(name)), _BUFFER_BYTES)

    def write(self, name: str, content: bytes) -> None:
        """Write a file, replacing one that is there."""
        with _translated(self._path(name)), written_whole(self._path(name)) as file:
            file.write(content)

    @contextmanager
    def new_file(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file that appears when the block ends well, unless there is one by then."""
        path = self._path(name)
        with _translated(path, FileExistsError), written_whole(path, keep_existing=True) as file:
            yield file

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, or None if there is none."""
        with _translated(self._path(name)), suppress(FileNotFoundError, NotADirectoryError):
            return self._path(name).stat().st_size
        return None

    def files(self, folder: str) -> list[StoredFile]:
        """Return the files in `folder`; those that are being written are none."""
        found = []
        with _translated(self._path(folder)), suppress(FileNotFoundError), os.scandir(self._path(folder)) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # deleted since it was listed
                    if not entry.name.startswith(".") and entry.is_file():
                        found.append(_described(entry.name, entry.stat()))
        return found

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders in `folder`."""
        with _translated(self._path(folder)), suppress(FileNotFoundError), os.scandir(self._path(folder)) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
        return []

    def last_change(self, folder: str) -> datetime | None:
        """Return when the newest file or folder in `folder` was written, those being written included."""
        newest = None
        with _translated(self._path(folder)):
            for path in (self._path(folder), *self._path(folder).rglob("*")):
                with suppress(FileNotFoundError):
                    newest = max(newest or 0.0, path.stat().st_mtime)
        return None if newest is None else datetime.fromtimestamp(newest, UTC)

    def delete(self, name: str) -> None:
        """Delete a file if it is there."""
        path = self._path(name)
        with _translated(path), suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
            sync_folder(path.parent)

    def delete_folder(self, folder: str) -> None:
        """Delete all files in `folder` and below it, and the folder."""
        path = self._path(folder)
        with _translated(path):
            for _ in range(_DELETE_ATTEMPTS - 1):
                if not path.exists():
                    break
                shutil.rmtree(path, ignore_errors=True)
            if path.exists():
                shutil.rmtree(path)
            if path.parent.is_dir():
                sync_folder(path.parent)

    def remove_unfinished(self, folder: str) -> int:
        """Remove what writers that died left in `folder`."""
        with _translated(self._path(folder)):
            return remove_unfinished(self._path(folder))

    def free_bytes(self) -> int | None:
        """Return what the file system has left for us."""
        with _translated(self.root):
            existing = next(path for path in (self.root, *self.root.parents) if path.exists())
            return shutil.disk_usage(existing).free

    def local_path(self, name: str) -> Path | None:
        """Return the path of a file."""
        return self._path(name)

    def _path(self, name: str) -> Path:
        """Return where a file or folder called `name` is."""
        return self.root / name


class _Reading(io.RawIOBase):
    """A file whose faults are the storage's, also those that come after it was opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _translated(self._path):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int | None:  # noqa: ANN401 - whatever has a buffer
        with _translated(self._path):
            return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


def _described(name: str, status: os.stat_result) -> StoredFile:
    return StoredFile(name, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))


@contextmanager
def _translated(path: Path, *told: type[OSError]) -> Iterator[None]:
    """Turn every fault of the file system into a `StorageError`, except those that the caller is `told` as they are."""
    try:
        yield
    except told:
        raise
    except OSError as exc:
        kind = StorageFullError if exc.errno in NO_ROOM else StorageError
        raise kind(f"{exc.filename or path}: {exc.strerror or exc}") from exc
