"""The results of a job, from a server to a folder: several parts at a time, going on where an earlier try stopped."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import anyio
import anyio.to_thread
from pydantic import ValidationError

from jobs.files import remove_unfinished, sha256_of, sync_folder, written_whole
from jobs.layout import JobNames
from jobs.records import Manifest, PartSummary
from layerstack.address import job_path
from layerstack.errors import DownloadError, LayerstackError, ServerError, ServerUnreachableError
from layerstack.parallel import in_parallel
from layerstack.transport import Transport, patient_wait_s, record

_AT_A_TIME = 4
# A part is given up after so many answers without a byte of it, or so many seconds without an answer.
_EMPTY_ANSWERS = 6
_PATIENCE_S = 300.0
_SILENCE_S = 60.0
_PARTIAL = ".partial"


@dataclass(frozen=True)
class DownloadProgress:
    """How far a download got; what was there already counts."""

    parts: int
    parts_done: int = 0
    bytes: int = 0
    bytes_done: int = 0


OnProgress = Callable[[DownloadProgress], None]


def ignore_progress(_now: DownloadProgress) -> None:
    """Hear how far a download got, and do nothing."""


async def download(transport: Transport, job_id: str, folder: Path, on_progress: OnProgress) -> Manifest:
    """Download a finished job; `AsyncJobs.download` says how."""
    response = await transport.send("GET", f"{job_path(job_id)}/results", repeatable=True)
    manifest = record(Manifest, response.content, transport.url)
    target = _make_ready(folder, manifest)
    counter = _Counter(DownloadProgress(parts=len(manifest.parts), bytes=manifest.bytes), on_progress)
    parts = [_Part(transport, job_id, part, Path(target.part(part.index)), counter) for part in manifest.parts]
    await in_parallel([part.fetch for part in parts], _AT_A_TIME)
    with written_whole(Path(target.manifest)) as file:
        file.write(response.content)
    return manifest


@dataclass
class _Counter:
    now: DownloadProgress
    on_progress: OnProgress

    def add(self, *, bytes_: int = 0, parts: int = 0) -> None:
        self.now = replace(self.now, bytes_done=self.now.bytes_done + bytes_, parts_done=self.now.parts_done + parts)
        self.on_progress(self.now)


@dataclass
class _Part:
    """A part on its way. Its bytes gather in a hidden file beside it, which stays when the download breaks off."""

    transport: Transport
    job_id: str
    part: PartSummary
    path: Path
    counter: _Counter
    size: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    async def fetch(self) -> None:
        """Have the part in its place.

        Raises:
            DownloadError: it is not what the manifest says, or breaks off again and again.
        """
        if await anyio.to_thread.run_sync(self._is_there):
            self.counter.add(bytes_=self.part.bytes, parts=1)
            return
        partial_path = self.path.with_name(f".{self.path.name}.{self.part.sha256[:16]}{_PARTIAL}")
        with self._open(partial_path) as file:
            resumed = await anyio.to_thread.run_sync(self._take_over, file)
            self.counter.add(bytes_=self.size)
            await self._receive(file)
            if resumed and not self._is_right:  # what was there was damaged, or the job has been repaired since
                self._begin_anew(file)
                await self._receive(file)
            if not self._is_right:
                partial_path.unlink()
                raise DownloadError(
                    f"{self._name} is damaged: its SHA-256 is not the manifest's; "
                    "`layerstack jobs retry` has the server check its parts, and repair them"
                )
            await anyio.to_thread.run_sync(self._publish, file, partial_path)
        self.counter.add(parts=1)

    @property
    def _name(self) -> str:
        return f"{self.path.name}, part {self.part.index} of job {self.job_id},"

    @property
    def _is_right(self) -> bool:
        return self.size == self.part.bytes and self.digest.hexdigest() == self.part.sha256

    def _is_there(self) -> bool:
        return (
            self.path.is_file()
            and self.path.stat().st_size == self.part.bytes
            and sha256_of(self.path) == self.part.sha256
        )

    def _open(self, path: Path) -> IO[bytes]:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            file.close()
            raise DownloadError(f"{path.parent.parent} is being downloaded to by another process") from exc
        except OSError:
            pass  # a file system without locks
        return file

    def _take_over(self, file: IO[bytes]) -> bool:
        """Go on from what is there -> whether there was anything."""
        file.seek(0)
        while piece := file.read(2**20):
            self._note(piece)
        if self.size > self.part.bytes:
            self._forget(file)
        return self.size > 0

    def _begin_anew(self, file: IO[bytes]) -> None:
        self.counter.add(bytes_=-self.size)
        self._forget(file)

    def _forget(self, file: IO[bytes]) -> None:
        self.size, self.digest = 0, hashlib.sha256()
        file.truncate(0)

    def _note(self, piece: bytes) -> None:
        self.size += len(piece)
        self.digest.update(piece)

    async def _receive(self, file: IO[bytes]) -> None:
        """Read what is missing, across breaks."""
        empty_answers = faults = 0
        last_byte = anyio.current_time()
        while self.size < self.part.bytes:
            before = self.size
            try:
                await self._read_on(file)
                fault: LayerstackError = DownloadError("the answer ended too early")
            except (ServerUnreachableError, ServerError) as exc:
                if isinstance(exc, ServerError) and not exc.is_temporary:
                    raise
                fault = exc
            if self.size > before:
                empty_answers, faults, last_byte = 0, 0, anyio.current_time()
            elif _has_answered(fault):
                empty_answers += 1
            if empty_answers == _EMPTY_ANSWERS or anyio.current_time() - last_byte > _PATIENCE_S:
                raise DownloadError(
                    f"{self._name} breaks off at byte {self.size} of {self.part.bytes}: {fault}; the same command "
                    "goes on from there"
                ) from fault
            if self.size < self.part.bytes:
                faults += 1
                wait_s = patient_wait_s(fault, faults)
                self.transport.on_retry(fault, wait_s)
                await anyio.sleep(wait_s)

    async def _read_on(self, file: IO[bytes]) -> None:
        # Compressed on the way, its bytes would not be counted as those of the part.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={self.size}-"} if self.size else {})
        path = f"{job_path(self.job_id)}/parts/{self.part.index}"
        async with self.transport.stream(path, headers, read_s=_SILENCE_S) as response:
            if self.size and not response.headers.get("content-range", "").startswith(f"bytes {self.size}-"):
                self._begin_anew(file)
            async for piece in response.aiter_bytes():
                file.write(piece)
                self._note(piece)
                self.counter.add(bytes_=len(piece))
                if self.size > self.part.bytes:
                    return  # which is not what the manifest says

    def _publish(self, file: IO[bytes], partial_path: Path) -> None:
        file.flush()
        os.fsync(file.fileno())
        partial_path.replace(self.path)
        sync_folder(self.path.parent)


def _has_answered(fault: LayerstackError) -> bool:
    """Whether a server was there, and not busy, that yet did not send what it should have."""
    return not isinstance(fault, ServerError) and (not isinstance(fault, ServerUnreachableError) or fault.was_sent)


def _make_ready(folder: Path, manifest: Manifest) -> JobNames:
    """Remove what an earlier download left: unfinished files of another, and its manifest if it is not this one."""
    target = JobNames(str(folder.expanduser()))
    path, parts = Path(target.manifest), Path(target.parts_folder)
    for each in (path.parent, parts):
        remove_unfinished(each)
    wanted = {part.sha256[:16] for part in manifest.parts}
    for left in parts.glob(f".*{_PARTIAL}"):
        if left.name.removesuffix(_PARTIAL).rpartition(".")[2] not in wanted:
            with suppress(FileNotFoundError):
                left.unlink()
    if path.is_file() and not _is_manifest(path, manifest):
        path.unlink()
        sync_folder(path.parent)
    return target


def _is_manifest(path: Path, manifest: Manifest) -> bool:
    try:
        return Manifest.model_validate_json(path.read_bytes()) == manifest
    except ValidationError:
        return False
