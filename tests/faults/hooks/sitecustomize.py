"""Lets a test make the storage fail, from outside. Python imports this by its name when a process starts.

The processes are those that users run, with this folder on their path. In the folder `$FAULTS_FOLDER`

- the file `failing` says what fails with EIO below `$LAYERSTACK_STORAGE`: `writes`, or `reads and writes`;
- the file `deadly` names a file, and whoever opens that is killed.

Each sync takes `$FAULTS_SYNC_S` at least, so that a job lasts long enough for a fault on the fastest machine.
"""

import errno
import io
import os
import signal
import time

FOLDER = os.environ.get("FAULTS_FOLDER")
STORAGE = os.environ.get("LAYERSTACK_STORAGE", "")
SYNC_S = float(os.environ.get("FAULTS_SYNC_S", "0"))

_io_open, _os_open, _fsync = io.open, os.open, os.fsync


def _said(name: str) -> str:
    try:
        with _io_open(os.path.join(FOLDER, name), encoding="utf-8") as file:  # noqa: PTH118 - pathlib opens with what is replaced here
            return file.read()
    except FileNotFoundError:
        return ""


def _fault(path: object) -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO), path)


class _CheckedReads(io.FileIO):
    """A file that was opened before the fault, and is read under it."""

    def readinto(self, buffer):
        if _said("failing") == "reads and writes":
            raise _fault(self.name)
        return super().readinto(buffer)


def _is_stored(path: object) -> bool:
    return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(STORAGE)


def _check(path: object, *, writes: bool) -> None:
    if not _is_stored(path):
        return
    if os.fspath(path) == _said("deadly"):
        os.kill(os.getpid(), signal.SIGKILL)
    failing = _said("failing")
    if failing == "reads and writes" or (failing and writes):
        raise _fault(path)


def _checked_io_open(file, mode="r", buffering=-1, *args, **options):
    _check(file, writes=set(mode) & set("wax+") != set())
    if mode == "rb" and buffering == 0 and _is_stored(file):
        return _CheckedReads(file)
    return _io_open(file, mode, buffering, *args, **options)


def _checked_os_open(path, flags, *args, **options):
    _check(path, writes=flags & (os.O_WRONLY | os.O_RDWR) != 0)
    return _os_open(path, flags, *args, **options)


def _checked_fsync(descriptor):
    if _said("failing"):
        raise _fault(None)
    time.sleep(SYNC_S)
    return _fsync(descriptor)


if FOLDER is not None:
    io.open, os.open, os.fsync = _checked_io_open, _checked_os_open, _checked_fsync
