"""The jobs in storage. The files are the truth: what a job is and how far it got follows from them alone."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice
from typing import IO, TypeVar

from pydantic import BaseModel, ValidationError
from ulid import ULID

from jobs.chunking import ChunkLimits
from jobs.creation import create_job
from jobs.errors import (
    JobNotFoundError,
    JobStateError,
    PartNotFoundError,
    PartNotReadyError,
    RecordFormatError,
    ResultsExpiredError,
)
from jobs.layout import JOBS, JobNames, is_job_id, job_names, json_index, part_index
from jobs.parts import read_prompts
from jobs.progress import JobFiles
from jobs.records import (
    ChunkFailure,
    ChunkStarts,
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

_R = TypeVar("_R", bound=BaseModel)
_KNOWN_JOBS = 256
logger = logging.getLogger(__name__)


class JobStore:
    """All jobs in a storage.

    Every method that takes a job id raises `JobNotFoundError` if there is no such job, and `RecordFormatError` if one
    of its JSON files cannot be read; all raise `StorageError` if the storage fails.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        # What never changes, and is needed for every chunk of a job.
        self._starts = lru_cache(_KNOWN_JOBS)(self._read_starts)

    def create(
        self,
        prompts: Iterable[Prompt],
        *,
        options: JobOptions,
        encoder: EncoderInfo,
        limits: ChunkLimits,
        metadata: Mapping[str, str],
        reserve_bytes: int = 0,
    ) -> JobRecord:
        """Store a new job, reading `prompts` once and holding a few chunks of them.

        Nothing of it stays if this raises, also when `prompts` does.

        Args:
            prompts: what to encode.
            options: what the client chose.
            encoder: who is to encode them.
            limits: of a chunk, where the options do not say.
            metadata: kept with the job.
            reserve_bytes: what the results have to leave free.

        Raises:
            NoPromptsError: there are none.
            NotEnoughSpaceError: the results would not fit.
        """
        job_id = str(ULID())
        return create_job(
            self.storage,
            job_id,
            prompts,
            options=options,
            encoder=encoder,
            limits=limits,
            metadata=metadata,
            reserve_bytes=reserve_bytes,
        )

    def load(self, job_id: str) -> JobRecord:
        """Return what was asked."""
        record = self._read_or_none(job_names(job_id).record, JobRecord)
        if record is None:
            raise JobNotFoundError(job_id)
        return record

    def exists(self, job_id: str) -> bool:
        """Whether there is such a job."""
        return self.storage.size(job_names(job_id).record) is not None

    def files(self, job_id: str) -> JobFiles:
        """Return all that the job's files say."""
        names, record = job_names(job_id), self.load(job_id)
        present = self.marks(job_id)
        manifest = self._read_or_none(names.manifest, Manifest) if names.manifest in present else None
        parts = {part.index: part.bytes for part in manifest.parts} if manifest else self._parts(names)
        return JobFiles(
            record=record,
            starts=self._starts(job_id),
            parts=parts,
            failures={} if manifest else self._failures(names, parts),
            manifest=manifest,
            cancelled=self._read_or_none(names.cancelled, Mark) if names.cancelled in present else None,
            expired=self._read_or_none(names.expired, Mark) if names.expired in present else None,
        )

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

    def list_ids(self, *, limit: int, after: str | None = None) -> list[str]:
        """Return up to `limit` job ids, newest first, those older than `after` if that is given."""
        folders = (name for name in self.storage.folders(JOBS) if is_job_id(name))
        older = sorted((name for name in folders if after is None or name < after), reverse=True)
        return list(islice((job_id for job_id in older if self.exists(job_id)), limit))

    def num_rows(self, job_id: str, chunk: int) -> int:
        """Return how many prompts a chunk has."""
        starts = self._starts(job_id)
        return starts[chunk + 1] - starts[chunk]

    def prompts(self, job_id: str, chunk: int) -> Iterator[tuple[int, Prompt]]:
        """Yield a chunk's prompts with their positions in the job."""
        try:
            with self.storage.open(job_names(job_id).prompts(chunk)) as file:
                yield from read_prompts(file)
        except FileNotFoundError as exc:
            if not self.exists(job_id):
                raise JobNotFoundError(job_id) from exc
            raise RecordFormatError(f"the prompts of chunk {chunk} are missing ({exc})") from exc

    # What workers write.

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
        report = self._read_or_none(job_names(job_id).report(chunk), PartReport)
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
        earlier = self._failure(name)
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
        return self._failure(job_names(job_id).failure(chunk))

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
        if not self.exists(job_id):
            raise JobNotFoundError(job_id)
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
        manifest = self._read_or_none(job_names(job_id).manifest, Manifest)
        if manifest is None:
            raise PartNotReadyError(f"job {job_id} has no results yet: it is {status}")
        return manifest

    def _status_without_expired(self, job_id: str) -> JobStatus:
        files = self.files(job_id)
        if files.expired:
            raise ResultsExpiredError(f"the results of job {job_id} expired at {files.expired.at:%Y-%m-%d %H:%M} UTC")
        return files.status()

    def _read_starts(self, job_id: str) -> tuple[int, ...]:
        name = job_names(job_id).chunks
        found = self._read_or_none(name, ChunkStarts)
        if found is not None:
            return found.starts
        if self.exists(job_id):  # it must not be taken for an upload that was cut off, and deleted
            raise RecordFormatError(f"{name} is missing")
        raise JobNotFoundError(job_id)

    def _parts(self, names: JobNames) -> dict[int, int]:
        files = self.storage.files(names.parts_folder)
        checked = {json_index(file.name) for file in files}
        return {n: file.size for file in files if (n := part_index(file.name)) is not None and n in checked}

    def _failures(self, names: JobNames, parts: Container[int]) -> dict[int, ChunkFailure]:
        """Return what went wrong with chunks that are not done; there may be many that went well in the end."""
        listed = [json_index(file.name) for file in self.storage.files(names.failures_folder)]
        read = {n: self._failure(names.failure(n)) for n in listed if n is not None and n not in parts}
        return {chunk: failure for chunk, failure in read.items() if failure is not None}

    def _failure(self, name: str) -> ChunkFailure | None:
        """Return what a file says of a failure. One that cannot be read counts for nothing: it holds no rows."""
        try:
            return self._read_or_none(name, ChunkFailure)
        except RecordFormatError as exc:
            logger.error("attempts are counted anew: %s", exc)  # noqa: TRY400 - the message says it all
            return None

    def _read_or_none(self, name: str, kind: type[_R]) -> _R | None:
        try:
            return kind.model_validate_json(self.storage.read(name))
        except FileNotFoundError:
            return None
        except ValidationError as exc:
            raise RecordFormatError(f"{name} is damaged, or of another version of layerstack: {exc}") from exc

    def _write_record(self, name: str, record: Record | View) -> None:
        self.storage.write(name, as_json(record))
