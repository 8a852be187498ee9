"""The jobs in storage. The files are the truth: what a job is and how far it got follows from them alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache
from typing import IO

from ulid import ULID

from jobs.chunking import ChunkLimits
from jobs.counting import PartCounter
from jobs.creation import create_job
from jobs.errors import (
    JobNotFoundError,
    JobStateError,
    PartNotFoundError,
    PartNotReadyError,
    RecordFormatError,
    ResultsExpiredError,
)
from jobs.layout import JOBS, idempotency_digest, is_job_id, job_names
from jobs.parts import read_prompts
from jobs.progress import Counts, JobFiles
from jobs.publishing import find, withdraw
from jobs.rate import Reported
from jobs.reading import JobReader
from jobs.records import (
    ChunkFailure,
    EncoderInfo,
    JobOptions,
    JobRecord,
    JobStatus,
    Manifest,
    Mark,
    PartReport,
    Prompt,
    Record,
    View,
    as_json,
)
from jobs.storage import Storage

_KNOWN_JOBS = 256
logger = logging.getLogger(__name__)


class JobStore:
    """All jobs in a storage.

    Every method that takes a job id raises `JobNotFoundError` if there is no such job, and `RecordFormatError` if one
    of its JSON files cannot be read; all raise `StorageError` if the storage fails.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._reader = JobReader(storage)
        self._started = lru_cache(_KNOWN_JOBS)(self._mark_started)
        self._counter = PartCounter(self.report)

    def create(
        self,
        prompts: Iterable[Prompt],
        *,
        options: JobOptions,
        encoder: EncoderInfo,
        limits: ChunkLimits,
        metadata: Mapping[str, str],
        reserve_bytes: int = 0,
        owner: str | None = None,
        idempotency_key: str | None = None,
        job_id: str | None = None,
    ) -> JobRecord:
        """Store a new job, reading `prompts` once and holding a few chunks of them.

        Nothing of it stays if this raises, also when `prompts` does. With an `idempotency_key` there is one exception:
        if the storage fails at the very end, the job may be there for whoever asks with the same key.

        Args:
            prompts: what to encode.
            options: what the client chose.
            encoder: who is to encode them.
            limits: of a chunk, where the options do not say.
            metadata: kept with the job.
            reserve_bytes: what the results have to leave free.
            owner: name of the key that makes it.
            idempotency_key: if a job of the same key and owner exists at the end, this one is dropped.
            job_id: a ULID that is new, by which the caller tells its own job from one of the same key.

        Returns:
            The new job, or the one of the same key.

        Raises:
            NoPromptsError: there are none.
            NotEnoughSpaceError: the results would not fit.
        """
        return create_job(
            self.storage,
            job_id or str(ULID()),
            prompts,
            options=options,
            encoder=encoder,
            limits=limits,
            metadata=metadata,
            reserve_bytes=reserve_bytes,
            owner=owner,
            idempotency_key=idempotency_key,
        )

    def created_before(self, owner: str | None, idempotency_key: str) -> str | None:
        """Return the id of the job that an earlier `create` with this key made for this owner, if it still exists."""
        found = find(self.storage, idempotency_digest(owner, idempotency_key))
        return found.id if found else None

    def load(self, job_id: str) -> JobRecord:
        """Return what was asked."""
        return self._reader.record(job_id)

    def exists(self, job_id: str) -> bool:
        """Whether there is such a job."""
        return self._reader.exists(job_id)

    def check_owner(self, job_id: str, owner: str | None) -> None:
        """Find out whether a job is `owner`'s; without an owner, every job is. Whether it still exists is not asked.

        Raises:
            JobNotFoundError: it is somebody else's, or nobody's, or there is none.
        """
        if owner is not None and not self._reader.is_of(job_id, owner):
            raise JobNotFoundError(job_id)

    def files(self, job_id: str) -> JobFiles:
        """Return all that the job's files say."""
        names, record, starts = job_names(job_id), self.load(job_id), self._reader.starts(job_id)
        present = self.marks(job_id)
        manifest = self._reader.read_or_none(names.manifest, Manifest) if names.manifest in present else None
        if manifest:
            parts, reported = {part.index: part.bytes for part in manifest.parts}, list[Reported]()
        else:
            parts, reported = self._reader.parts(names, starts)
        return JobFiles(
            record=record,
            starts=starts,
            parts=parts,
            failures={} if manifest else self._reader.failures(names, parts),
            manifest=manifest,
            started=self._reader.started(names, present[names.started]) if names.started in present else None,
            cancelled=self._reader.read_or_none(names.cancelled, Mark) if names.cancelled in present else None,
            expired=self._reader.read_or_none(names.expired, Mark) if names.expired in present else None,
            reported=reported,
        )

    def counts(self, files: JobFiles) -> Counts | None:
        """Return how many rows of the finished parts succeeded, failed and were cut; None if that is too much to read.

        What the reports of a job's parts say is remembered; the first call reads up to 1,000 of them.
        """
        return self._counter.counts(files)

    def marks(self, job_id: str) -> dict[str, datetime]:
        """Return when each file of the job's own folder was written: `manifest.json` is one, parts are none."""
        names = job_names(job_id)
        found = {f"{names.folder}/{file.name}": file.modified_at for file in self.storage.files(names.folder)}
        if names.record not in found:
            raise JobNotFoundError(job_id)
        return found

    def has_manifest(self, job_id: str) -> bool:
        """Whether a job has succeeded."""
        return self.storage.size(job_names(job_id).manifest) is not None

    def newest(self, *, after: str | None = None, owner: str | None = None) -> Iterator[str]:
        """Yield the ids of jobs, newest first: those older than `after`, and those of `owner`, if these are given.

        One listing names all jobs. Whether one exists, and whose it is, is looked up when it is its turn.
        """
        folders = (name for name in self.storage.folders(JOBS) if is_job_id(name))
        for job_id in sorted((name for name in folders if after is None or name < after), reverse=True):
            if (owner is None or self._reader.is_of(job_id, owner)) and self.exists(job_id):
                yield job_id

    def num_rows(self, job_id: str, chunk: int) -> int:
        """Return how many prompts a chunk has."""
        starts = self._reader.starts(job_id)
        return starts[chunk + 1] - starts[chunk]

    def prompts(self, job_id: str, chunk: int) -> Iterator[tuple[int, Prompt]]:
        """Yield a chunk's prompts with their positions in the job."""
        name = job_names(job_id).prompts(chunk)
        try:
            with self.storage.open(name) as file:
                yield from read_prompts(file, name)
        except FileNotFoundError as exc:
            if not self.exists(job_id):
                raise JobNotFoundError(job_id) from exc
            raise RecordFormatError(f"the prompts of chunk {chunk} are missing ({exc})") from exc

    # What workers write.

    def begin(self, job_id: str) -> None:
        """Note that a chunk is begun; the first time of a job counts."""
        self._started(job_id)

    @contextmanager
    def new_part(self, job_id: str, chunk: int) -> Iterator[IO[bytes]]:
        """Open a part for writing; it is there once the block has ended well, and counts once `count_part` is called.

        Raises:
            FileExistsError: at the end, if somebody else has written it meanwhile: theirs stays.
        """
        with self.storage.new_file(job_names(job_id).part(chunk)) as file:
            yield file

    def count_part(self, job_id: str, report: PartReport) -> None:
        """Let a part that has been checked count."""
        self._write_record(job_names(job_id).report(report.part.index), report)

    def report(self, job_id: str, chunk: int) -> PartReport:
        """Return what is in a part that counts.

        Raises:
            PartNotReadyError: it does not count yet.
        """
        report = self._reader.read_or_none(job_names(job_id).report(chunk), PartReport)
        if report is None:
            raise PartNotReadyError(f"part {chunk} of job {job_id} is not there yet")
        return report

    def discard_part(self, job_id: str, chunk: int) -> None:
        """Delete a part, so that its chunk is done anew."""
        names = job_names(job_id)
        self.storage.delete(names.report(chunk))
        self.storage.delete(names.part(chunk))

    def has_part(self, job_id: str, chunk: int) -> bool:
        """Whether a chunk is done."""
        names = job_names(job_id)
        return self.storage.size(names.report(chunk)) is not None and self.storage.size(names.part(chunk)) is not None

    def note_failure(self, job_id: str, chunk: int, error: str, *, crashed: bool, limit: int) -> ChunkFailure:
        """Note that an attempt at a chunk failed, and whether it was the last.

        Args:
            job_id: which job.
            chunk: which chunk of it.
            error: what happened.
            crashed: whether its worker died.
            limit: attempts of this kind that a chunk has.
        """
        name = job_names(job_id).failure(chunk)
        earlier = self._reader.failure(name)
        attempts = (earlier.attempts if earlier else 0) + (not crashed)
        crashes = (earlier.crashes if earlier else 0) + crashed
        failure = ChunkFailure(
            chunk=chunk,
            attempts=attempts,
            crashes=crashes,
            gave_up=(crashes if crashed else attempts) >= limit,
            error=error,
            failed_at=datetime.now(UTC),
        )
        self._write_record(name, failure)
        return failure

    def failure(self, job_id: str, chunk: int) -> ChunkFailure | None:
        """Return what went wrong with a chunk so far, if anything did."""
        return self._reader.failure(job_names(job_id).failure(chunk))

    def write_manifest(self, job_id: str, manifest: Manifest) -> None:
        """Finish a job, unless it is finished already."""
        try:
            with self.storage.new_file(job_names(job_id).manifest) as file:
                file.write(as_json(manifest))
        except FileExistsError:
            return

    # What clients ask for.

    def cancel(self, job_id: str) -> None:
        """Mark a job to be stopped.

        Raises:
            JobStateError: it is finished.
        """
        status = self.files(job_id).status()
        if status is JobStatus.CANCELLED:
            return
        if status.is_final:
            raise JobStateError(f"job {job_id} is {status} and cannot be cancelled")
        self._write_record(job_names(job_id).cancelled, Mark(at=datetime.now(UTC)))

    def is_cancelled(self, job_id: str) -> bool:
        """Whether a job is to be stopped, or deleted."""
        return self.storage.size(job_names(job_id).cancelled) is not None or not self.exists(job_id)

    def is_stopped(self, job_id: str) -> bool:
        """Whether no chunk of a job is to go on: it is cancelled or deleted, or failed while others are under way."""
        if self.is_cancelled(job_id):
            return True
        if self._reader.fixed(job_id).on_error == "continue":
            return False
        failures = self._reader.failures(job_names(job_id), ())
        return any(each.gave_up and not self.has_part(job_id, chunk) for chunk, each in failures.items())

    def retry(self, job_id: str) -> None:
        """Let a job go on that failed or was cancelled; one that succeeded is checked again, and repaired.

        Raises:
            JobStateError: its results have expired.
        """
        names = job_names(job_id)
        if self.files(job_id).expired:
            raise JobStateError(f"job {job_id} has expired: its prompts and results are deleted")
        for file in self.storage.files(names.failures_folder):
            self.storage.delete(f"{names.failures_folder}/{file.name}")
        self.storage.delete(names.cancelled)
        self.storage.delete(names.manifest)

    def delete(self, job_id: str) -> None:
        """Delete a job and its results. From the first moment there is no such job any more."""
        names = job_names(job_id)
        try:
            withdraw(self.storage, self.load(job_id))
        except RecordFormatError as exc:
            logger.warning("job %s is deleted all the same: %s", job_id, exc)
            self.storage.delete(names.chunks)  # or the marker of its `Idempotency-Key` could bring it back
            self.storage.delete(names.record)
        self.storage.delete_folder(names.folder)

    def expire(self, job_id: str) -> None:
        """Delete a job's prompts and results; the record and the manifest stay. May be called again."""
        names = job_names(job_id)
        if self.storage.size(names.expired) is None:
            self._write_record(names.expired, Mark(at=datetime.now(UTC)))
        for folder in (names.parts_folder, names.prompts_folder, names.failures_folder):
            self.storage.delete_folder(folder)

    def part_name(self, job_id: str, chunk: int) -> str:
        """Return the name in storage of a part that counts.

        Raises:
            PartNotFoundError: the job never has such a part.
            PartNotReadyError: it is not there yet; the message tells the job's status.
            ResultsExpiredError: it is not there any more.
        """
        record = self.load(job_id)
        if not 0 <= chunk < record.num_chunks:
            last = record.num_chunks - 1
            raise PartNotFoundError(f"job {job_id} has no part {chunk}: its parts are 0 to {last}")
        if self.has_part(job_id, chunk):
            return job_names(job_id).part(chunk)
        status = self._status_without_expired(job_id)
        raise PartNotReadyError(f"part {chunk} of job {job_id} is not there yet: the job is {status}")

    def manifest(self, job_id: str) -> Manifest:
        """Return what came out.

        Raises:
            PartNotReadyError: the job has not finished; the message tells its status.
            ResultsExpiredError: the results are not there any more.
        """
        status = self._status_without_expired(job_id)
        manifest = self._reader.read_or_none(job_names(job_id).manifest, Manifest)
        if manifest is None:
            raise PartNotReadyError(f"job {job_id} has no results yet: it is {status}")
        return manifest

    def _status_without_expired(self, job_id: str) -> JobStatus:
        files = self.files(job_id)
        if files.expired:
            raise ResultsExpiredError(f"the results of job {job_id} expired at {files.expired.at:%Y-%m-%d %H:%M} UTC")
        return files.status()

    def _mark_started(self, job_id: str) -> None:
        name = job_names(job_id).started
        if self.storage.size(name) is None:
            with suppress(FileExistsError), self.storage.new_file(name) as file:
                file.write(as_json(Mark(at=datetime.now(UTC))))

    def _write_record(self, name: str, record: Record | View) -> None:
        self.storage.write(name, as_json(record))
