"""Files that exist whole or not at all, whenever the machine stops, and their digests."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What writing answers where nothing more fits."""
_SUFFIX = ".tmp"
# What link() answers on file systems without hard links.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


@contextmanager
def written_whole(path: Path, *, keep_existing: bool = False) -> Iterator[IO[bytes]]:
    """Open a file that appears at `path` when the block ends well, and leaves nothing behind when it does not.

    A process that is killed meanwhile leaves a temporary file behind, which `remove_unfinished` knows to be dead.

    Args:
        path: its folder is made if need be.
        keep_existing: whether a file that is there by then stays, instead of being replaced.

    Raises:
        FileExistsError: at the end, if `keep_existing` and the file is there already.
    """
    _make_folder(path.parent)
    file, unfinished = _open_locked(path)
    try:
        with file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # mkstemp makes it private; api and worker may run as different users
            os.fsync(file.fileno())
            _publish(unfinished, path, keep_existing=keep_existing)
        sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> int:
    """Remove what writers that died left in `folder`; what somebody still writes is locked, and stays.

    Returns:
        How many files have been removed.
    """
    removed = 0
    for path in folder.glob(f".*{_SUFFIX}"):
        with suppress(OSError):  # locked, gone, or on a file system without locks
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            removed += 1
    return removed


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make what has been made, renamed or removed in `folder` last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_locked(path: Path) -> tuple[IO[bytes], Path]:
    """Make a temporary file beside `path`, locked for as long as it is open."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent)
        file = os.fdopen(descriptor, "wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = True
        except OSError as exc:  # a file system without locks, unless it is locked: then nothing is ever removed as dead
            is_ours = not isinstance(exc, BlockingIOError)
        if is_ours and os.fstat(descriptor).st_nlink:
            return file, Path(name)
        file.close()  # somebody took it for dead before it was locked


def _publish(unfinished: Path, path: Path, *, keep_existing: bool) -> None:
    if not keep_existing:
        unfinished.replace(path)
        return
    try:
        path.hardlink_to(unfinished)  # unlike a rename, it fails if the file is there
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from exc
        unfinished.replace(path)


def _make_folder(folder: Path) -> None:
    """Make `folder` and its parents, so that each lasts."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError as exc:  # which would say that the file is there, not that a folder cannot be
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from exc
        sync_folder(folder.parent)
