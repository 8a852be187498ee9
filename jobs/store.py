"""The jobs in storage. The files are the truth: what a job is and how far it got follows from them alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
from ulid import ULID

from jobs.errors import JobNotFoundError, NoPromptsError, PartNotFoundError, PartNotReadyError
from jobs.files import sha256_of, written_whole
from jobs.layout import JobFolder, is_job_id, job_folder, jobs_folder, part_index
from jobs.parts import open_part, read_prompts, write_prompts
from jobs.records import (
    ChunkFailure,
    EncoderInfo,
    JobOptions,
    JobRecord,
    JobStatus,
    JobView,
    Manifest,
    PartSummary,
    PartView,
    Prompt,
    RowError,
)

_MANIFEST_ERRORS = 1000
_MANIFEST_COLUMNS = ["index", "id", "num_tokens", "truncated", "error"]


class JobStore:
    """All jobs under one storage folder.

    Every method that takes a job id raises `JobNotFoundError` if there is no such job.
    """

    def __init__(self, storage: str | Path) -> None:
        self._storage = Path(storage).expanduser().resolve()

    def check(self) -> None:
        """Make the folder if need be.

        Raises:
            OSError: it cannot be made or read.
        """
        jobs_folder(self._storage).mkdir(parents=True, exist_ok=True)
        next(jobs_folder(self._storage).iterdir(), None)

    def create(
        self,
        prompts: Iterable[Prompt],
        *,
        options: JobOptions,
        encoder: EncoderInfo,
        default_chunk_rows: int,
        metadata: Mapping[str, str],
    ) -> JobRecord:
        """Store a new job, reading `prompts` once and holding one chunk of them.

        Nothing of it stays if this raises, also when `prompts` does.

        Raises:
            NoPromptsError: there are none.
        """
        created_at = datetime.now(UTC)
        folder = job_folder(self._storage, str(ULID()))
        chunk_rows = options.chunk_rows or default_chunk_rows
        try:
            num_prompts, num_chunks = _write_chunks(folder, prompts, chunk_rows)
            record = JobRecord(
                id=folder.path.name,
                created_at=created_at,
                num_prompts=num_prompts,
                num_chunks=num_chunks,
                chunk_rows=chunk_rows,
                dtype=options.dtype or encoder.dtype,
                layout=options.layout,
                compression=options.compression,
                fingerprint=encoder.fingerprint,
                metadata=dict(metadata),
            )
            _write_json(folder.record, record.model_dump_json(indent=2))
        except BaseException:
            shutil.rmtree(folder.path, ignore_errors=True)
            raise
        return record

    def remove(self, job_id: str) -> None:
        """Delete a job and its results."""
        shutil.rmtree(self._existing(job_id).path)

    def load(self, job_id: str) -> JobRecord:
        """Return what was asked."""
        return JobRecord.model_validate_json(self._existing(job_id).record.read_bytes())

    def list_ids(self, *, limit: int, after: str | None = None) -> list[str]:
        """Return up to `limit` job ids, newest first, those older than `after` if that is given."""
        folder = jobs_folder(self._storage)
        names = (path.name for path in folder.iterdir()) if folder.is_dir() else iter(())
        older = sorted((n for n in names if is_job_id(n) and (after is None or n < after)), reverse=True)
        return list(islice((n for n in older if JobFolder(folder / n).record.is_file()), limit))

    def prompts(self, job_id: str, chunk: int) -> Iterator[tuple[int, Prompt]]:
        """Yield a chunk's prompts with their positions in the job."""
        return read_prompts(self._existing(job_id).prompts(chunk))

    def has_part(self, job_id: str, chunk: int) -> bool:
        """Whether a chunk is done."""
        return self._existing(job_id).part(chunk).is_file()

    @contextmanager
    def new_part(self, job_id: str, chunk: int) -> Iterator[IO[bytes]]:
        """Open a part for writing; it exists once the block has ended well.

        If somebody else has written it meanwhile, theirs stays: a manifest may have its digest already.
        """
        with written_whole(self._existing(job_id).part(chunk), keep_existing=True) as file:
            yield file

    def part_path(self, job_id: str, chunk: int) -> Path:
        """Return the file of a finished part.

        Raises:
            PartNotFoundError: the job never has such a part.
            PartNotReadyError: it is not there yet; the message tells the job's status.
        """
        record = self.load(job_id)
        if not 0 <= chunk < record.num_chunks:
            last = record.num_chunks - 1
            raise PartNotFoundError(f"job {job_id} has no part {chunk}: its parts are 0 to {last}")
        path = self._existing(job_id).part(chunk)
        if path.is_file():
            return path
        raise PartNotReadyError(f"part {chunk} of job {job_id} is not there yet: the job is {self.view(job_id).status}")

    def record_failure(self, job_id: str, chunk: int, error: str, max_attempts: int) -> ChunkFailure:
        """Note that an attempt at a chunk failed, and whether it was the last."""
        path = self._existing(job_id).failure(chunk)
        earlier = ChunkFailure.model_validate_json(path.read_bytes()).attempts if path.is_file() else 0
        attempts = earlier + 1
        failure = ChunkFailure(
            chunk=chunk,
            attempts=attempts,
            gave_up=attempts >= max_attempts,
            error=error,
            failed_at=datetime.now(UTC),
        )
        _write_json(path, failure.model_dump_json(indent=2))
        return failure

    def finalise(self, job_id: str) -> Manifest | None:
        """Write the manifest if every part is there; does nothing if it is written already.

        Returns:
            The manifest, or None while parts are missing.
        """
        folder, record = self._existing(job_id), self.load(job_id)
        if folder.manifest.is_file():
            return self.manifest(job_id)
        if any(not folder.part(chunk).is_file() for chunk in range(record.num_chunks)):
            return None
        errors: list[RowError] = []
        parts = [_summarise(folder.part(chunk), chunk, errors) for chunk in range(record.num_chunks)]
        manifest = Manifest(
            job_id=job_id,
            fingerprint=record.fingerprint,
            finished_at=datetime.now(UTC),
            rows=sum(part.rows for part in parts),
            bytes=sum(part.bytes for part in parts),
            succeeded=sum(part.succeeded for part in parts),
            failed=sum(part.failed for part in parts),
            truncated=sum(part.truncated for part in parts),
            tokens=sum(part.tokens for part in parts),
            parts=parts,
            errors=errors,
        )
        _write_json(folder.manifest, manifest.model_dump_json(indent=2))
        return manifest

    def manifest(self, job_id: str) -> Manifest:
        """Return what came out.

        Raises:
            PartNotReadyError: the job has not finished; the message tells its status.
        """
        path = self._existing(job_id).manifest
        if not path.is_file():
            raise PartNotReadyError(f"job {job_id} has no results yet: it is {self.view(job_id).status}")
        return Manifest.model_validate_json(path.read_bytes())

    def view(self, job_id: str, progress: Mapping[int, int] | None = None) -> JobView:
        """Return how far a job got.

        Args:
            job_id: which job.
            progress: rows encoded so far of chunks being worked on, if anybody knows.
        """
        folder, record = self._existing(job_id), self.load(job_id)
        done = sorted(n for path in _listed(folder.parts) if (n := part_index(path)) is not None)
        finished = set(done)
        started = {chunk: rows for chunk, rows in (progress or {}).items() if chunk not in finished}
        manifest = self.manifest(job_id) if folder.manifest.is_file() else None
        failure = None if manifest else _hopeless(folder)
        num_done = sum(_rows_in_chunk(record, chunk) for chunk in done) + sum(started.values())
        return JobView(
            id=record.id,
            status=_status(succeeded=manifest is not None, failed=failure is not None, running=bool(done or started)),
            created_at=record.created_at,
            finished_at=manifest.finished_at if manifest else failure.failed_at if failure else None,
            num_prompts=record.num_prompts,
            num_done=min(num_done, record.num_prompts),
            num_failed=manifest.failed if manifest else None,
            num_truncated=manifest.truncated if manifest else None,
            num_parts=record.num_chunks,
            num_parts_done=len(done),
            options=JobOptions(
                dtype=record.dtype,
                layout=record.layout,
                compression=record.compression,
                chunk_rows=record.chunk_rows,
            ),
            fingerprint=record.fingerprint,
            metadata=record.metadata,
            error=f"chunk {failure.chunk}, after {failure.attempts} attempts: {failure.error}" if failure else None,
            parts=[
                PartView(index=n, bytes=folder.part(n).stat().st_size, url=f"/jobs/{record.id}/parts/{n}") for n in done
            ],
        )

    def _existing(self, job_id: str) -> JobFolder:
        folder = job_folder(self._storage, job_id)
        if not folder.record.is_file():
            raise JobNotFoundError(job_id)
        return folder


def _write_chunks(folder: JobFolder, prompts: Iterable[Prompt], chunk_rows: int) -> tuple[int, int]:
    """Write `prompts` chunk by chunk; returns how many prompts and chunks there are."""
    num_prompts = num_chunks = 0
    waiting = iter(prompts)
    while chunk := list(islice(waiting, chunk_rows)):
        with written_whole(folder.prompts(num_chunks)) as file:
            write_prompts(file, num_prompts, chunk)
        num_prompts += len(chunk)
        num_chunks += 1
    if not num_prompts:
        raise NoPromptsError("a job needs at least one prompt")
    return num_prompts, num_chunks


def _status(*, succeeded: bool, failed: bool, running: bool) -> JobStatus:
    if succeeded:
        return JobStatus.SUCCEEDED
    if failed:
        return JobStatus.FAILED
    return JobStatus.RUNNING if running else JobStatus.QUEUED


def _rows_in_chunk(record: JobRecord, chunk: int) -> int:
    return min(record.chunk_rows, record.num_prompts - chunk * record.chunk_rows)


def _hopeless(folder: JobFolder) -> ChunkFailure | None:
    """Return the failure of the first chunk that has used up its attempts, finishing the job included."""
    for path in sorted(_listed(folder.failures)):
        if path.suffix == ".json" and not path.name.startswith("."):
            failure = ChunkFailure.model_validate_json(path.read_bytes())
            if failure.gave_up:
                return failure
    return None


def _summarise(path: Path, index: int, errors: list[RowError]) -> PartSummary:
    """Describe a finished part, and add its failed rows to `errors` while there is room."""
    with closing(open_part(path)) as part:
        table = part.read(columns=_MANIFEST_COLUMNS)
    bad = table.filter(pc.is_valid(table["error"]))
    errors += [
        RowError(index=row["index"], id=row["id"], error=row["error"])
        for row in bad.slice(0, _MANIFEST_ERRORS - len(errors)).to_pylist()
    ]
    return PartSummary(
        index=index,
        rows=table.num_rows,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        succeeded=table.num_rows - bad.num_rows,
        failed=bad.num_rows,
        truncated=_total(table["truncated"]),
        tokens=_total(table["num_tokens"]),
    )


def _total(column: pa.ChunkedArray) -> int:
    return pc.sum(column).as_py() or 0


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _write_json(path: Path, text: str) -> None:
    with written_whole(path) as file:
        file.write(text.encode("utf-8") + b"\n")
