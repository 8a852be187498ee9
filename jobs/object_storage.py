"""Storage in an object store: `s3://bucket/prefix` or `gs://bucket/prefix`.

Credentials, region and endpoint come from the environment, under the names that the stores' own tools use. An object
appears when its upload is complete. The first writer of a part wins by a conditional put.
"""

from __future__ import annotations

import io
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import IO, Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError
from obstore.store import from_url

from jobs.errors import SettingsError, StorageError
from jobs.rangefile import RangeFile
from jobs.storage import Storage, StoredFile

_RETRIES: Any = {"max_retries": 6, "retry_timeout": timedelta(seconds=30)}
_READ_AHEAD_BYTES = 2**18
_DELETE_AT_ONCE = 1000


class ObjectStorage(Storage):
    """Objects under a prefix of a bucket."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        try:
            self._store: Any = from_url(self._url, retry_config=_RETRIES)  # one class a kind of store, with no base
        except (BaseError, ValueError) as exc:
            raise SettingsError(f"LAYERSTACK_STORAGE={url!r}: {_first_line(exc)}") from exc

    def check(self) -> None:
        """Find out whether the bucket can be read."""
        with self._translated(""):
            try:
                obstore.list_with_delimiter(self._store, "jobs/none")
            except FileNotFoundError as exc:
                raise StorageError(f"{self._url}: there is no such bucket") from exc

    def read(self, name: str) -> bytes:
        """Return an object's content."""
        with self._translated(name, FileNotFoundError):
            return bytes(obstore.get(self._store, name).bytes())

    def open(self, name: str) -> IO[bytes]:
        """Open an object for reading at any position; each read is a request for a range."""
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(f"{self._url}/{name}")
        return io.BufferedReader(_Ranges(self, name, size), _READ_AHEAD_BYTES)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop` of an object."""
        with self._translated(name, FileNotFoundError):
            return bytes(obstore.get_range(self._store, name, start=start, end=stop))

    def write(self, name: str, content: bytes) -> None:
        """Write an object, replacing one that is there."""
        with self._translated(name):
            obstore.put(self._store, name, content)

    @contextmanager
    def new_file(self, name: str) -> Iterator[IO[bytes]]:
        """Open a local file that is uploaded when the block ends well, unless there is such an object by then."""
        # Written here first: an upload of unknown length could not be conditional.
        with self._translated(name, FileExistsError), tempfile.TemporaryFile() as file:
            yield file
            file.flush()
            if file.tell() == 0:
                self._create(name, b"")
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                self._create(name, content)

    def size(self, name: str) -> int | None:
        """Return an object's size in bytes, or None if there is none."""
        with self._translated(name), suppress(FileNotFoundError):
            size: int = obstore.head(self._store, name)["size"]
            return size
        return None

    def files(self, folder: str) -> list[StoredFile]:
        """Return the objects in `folder`."""
        with self._translated(folder):
            listed = obstore.list_with_delimiter(self._store, folder)["objects"]
        return [StoredFile(each["path"].rpartition("/")[2], each["size"], each["last_modified"]) for each in listed]

    def folders(self, folder: str) -> list[str]:
        """Return the common prefixes in `folder`."""
        with self._translated(folder):
            listed = obstore.list_with_delimiter(self._store, folder)["common_prefixes"]
        return [each.rpartition("/")[2] for each in listed]

    def last_change(self, folder: str) -> datetime | None:
        """Return when the newest object in `folder` was written."""
        newest: datetime | None = None
        with self._translated(folder):
            for page in obstore.list(self._store, folder):
                newest = max([each["last_modified"] for each in page] + ([newest] if newest else []), default=None)
        return newest

    def delete(self, name: str) -> None:
        """Delete an object if it is there."""
        with self._translated(name), suppress(FileNotFoundError):
            obstore.delete(self._store, name)

    def delete_folder(self, folder: str) -> None:
        """Delete all objects in `folder` and below it."""
        with self._translated(folder):
            for page in obstore.list(self._store, folder, chunk_size=_DELETE_AT_ONCE):
                with suppress(FileNotFoundError):
                    obstore.delete(self._store, [each["path"] for each in page])

    def remove_unfinished(self, folder: str) -> int:  # noqa: ARG002 - nothing to look for
        """Do nothing: an upload that was cut off is no object."""
        return 0

    def free_bytes(self) -> int | None:
        """Return None: there is no limit that could be known."""
        return None

    def signed_url(self, name: str, seconds: int) -> str | None:
        """Return a URL by which anybody may GET an object, signed with our credentials; whether it is there or not."""
        with self._translated(name):
            return obstore.sign(self._store, "GET", name, timedelta(seconds=seconds))

    def _create(self, name: str, content: bytes | mmap.mmap) -> None:
        with self._translated(name, FileExistsError):
            try:
                obstore.put(self._store, name, content, mode="create", use_multipart=False)
            except AlreadyExistsError as exc:
                raise FileExistsError(f"{self._url}/{name}") from exc
            except (NotSupportedError, NotImplementedError):  # some stores speak S3 without conditions
                if self.size(name) is not None:
                    raise FileExistsError(f"{self._url}/{name}") from None
                obstore.put(self._store, name, content, use_multipart=False)

    @contextmanager
    def _translated(self, name: str, *told: type[OSError]) -> Iterator[None]:
        """Turn every fault of the store into a `StorageError`, except those that the caller is `told` as they are."""
        try:
            yield
        except told:
            raise
        except (BaseError, OSError) as exc:
            raise StorageError(f"{self._url}/{name}: {_first_line(exc)}") from exc


def _first_line(exc: Exception) -> str:
    """Return what an error says, without the whole configuration that obstore adds: nobody wants that in a log."""
    return str(exc).partition("\n")[0]


class _Ranges(RangeFile):
    """An object as a file."""

    def __init__(self, storage: ObjectStorage, name: str, size: int) -> None:
        super().__init__(size)
        self._storage, self._name = storage, name

    def read_range(self, start: int, stop: int) -> bytes:
        return self._storage.read_range(self._name, start, stop)
