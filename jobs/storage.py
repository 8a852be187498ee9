"""Where jobs are kept: files under names such as `jobs/{id}/job.json`, in a local folder or an object store.

A file exists whole or not at all, whenever a machine stops. Every fault of the storage is a `StorageError`; only a
file that is not there is a `FileNotFoundError`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from jobs.errors import SettingsError

OBJECT_STORES = ("s3://", "gs://")


@dataclass(frozen=True)
class StoredFile:
    """What a listing says of a file.

    Attributes:
        name: without its folder.
        size: in bytes.
        modified_at: when it was written.
    """

    name: str
    size: int
    modified_at: datetime


class Storage(ABC):
    """Named files. Names are relative, with `/` between folders; callers make them from validated ids only.

    Every method raises `StorageError` if the storage fails, and `StorageFullError` if it is full.
    """

    @abstractmethod
    def check(self) -> None:
        """Find out whether the storage can be used, and make what it needs."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return a file's content.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading at any position.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write a file, replacing one that is there."""

    @abstractmethod
    def new_file(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Open a file that appears when the block ends well, unless there is one by then: the first writer wins.

        Raises:
            FileExistsError: at the end, if there is one already.
        """

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, or None if there is none."""

    @abstractmethod
    def files(self, folder: str) -> list[StoredFile]:
        """Return the files in `folder`, not those in folders of it; none if there is no such folder."""

    @abstractmethod
    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders in `folder`."""

    @abstractmethod
    def last_change(self, folder: str) -> datetime | None:
        """Return when the newest file anywhere in `folder` was written, or None if there is none."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file if it is there."""

    @abstractmethod
    def delete_folder(self, folder: str) -> None:
        """Delete all files in `folder` and below it."""

    @abstractmethod
    def remove_unfinished(self, folder: str) -> int:
        """Remove what writers that died left in `folder` -> how many files."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Return how much more fits in, or None if that has no limit that could be known."""

    def local_path(self, name: str) -> Path | None:  # noqa: ARG002 - for those that have one
        """Return the path of a file on this machine, or None if it is not here."""
        return None

    def signed_url(self, name: str, seconds: int) -> str | None:  # noqa: ARG002 - for those that have one
        """Return a URL by which anybody may GET a file for so long, or None if there is no such thing here."""
        return None

    def stream(self, name: str, start: int, stop: int, piece_bytes: int = 2**20) -> Generator[bytes]:
        """Yield bytes `start` to `stop` of a file in pieces.

        Raises:
            FileNotFoundError: there is none.
        """
        with self.open(name) as file:
            file.seek(start)
            while start < stop and (piece := file.read(min(piece_bytes, stop - start))):
                start += len(piece)
                yield piece


def open_storage(url: str) -> Storage:
    """Return the storage at `url`: a folder, or a bucket with a prefix as `s3://bucket/prefix` or `gs://bucket/prefix`.

    Raises:
        SettingsError: the package for object stores is missing, or the URL or its credentials make no sense.
    """
    if not url.startswith(OBJECT_STORES):
        from jobs.local_storage import LocalStorage  # noqa: PLC0415 - so that this module imports neither kind

        return LocalStorage(Path(url))
    try:
        from jobs.object_storage import ObjectStorage  # noqa: PLC0415 - only those who use one need its package
    except ImportError as exc:
        raise SettingsError(f"LAYERSTACK_STORAGE={url!r} needs the package obstore ({exc})") from exc
    return ObjectStorage(url)
