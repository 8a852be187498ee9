"""From parts to results: what is checked before a part counts, and before a job has succeeded."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import IO, Any

import pyarrow.parquet as pq

from jobs.errors import JobsError, PartFormatError, PartNotReadyError, RecordFormatError
from jobs.layout import job_names
from jobs.parts import MAX_LISTED_ERRORS, RowCounts, damage_told, parse_part, read_header
from jobs.records import JobRecord, Manifest, PartReport, PartSummary, RowError
from jobs.storage import Storage
from jobs.store import JobStore

_COUNTED_COLUMNS = ["index", "id", "num_tokens", "truncated", "error"]
_READERS = 8
_PARTS_AT_ONCE = 1000
_PIECE_BYTES = 2**20


class DigestingFile(io.RawIOBase):
    """Writes to another file, and knows size and SHA-256 of what was written. Cannot seek."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        """In hexadecimal."""
        return self._digest.hexdigest()

    def writable(self) -> bool:
        """Tell that it is for writing."""
        return True

    def write(self, content: Any) -> int:  # noqa: ANN401 - whatever has a buffer
        """Write all of `content`."""
        self._digest.update(content)
        self._file.write(content)
        self.size += len(content)
        return len(content)


def inspect_part(store: JobStore, job_id: str, chunk: int) -> PartReport:
    """Read a part that is there, but of which nobody said that it is good.

    Raises:
        PartFormatError: it is damaged, or not what the job asks for.
        FileNotFoundError: it is not there.
    """
    name = job_names(job_id).part(chunk)
    counts = RowCounts()
    record, num_rows = store.load(job_id), store.num_rows(job_id, chunk)
    with _checked_footer(store.storage, name, record, num_rows) as part, damage_told(name):
        for batch in part.iter_batches(columns=_COUNTED_COLUMNS):
            for row in batch.to_pylist():
                counts.add(row)
    size, sha256 = _digest(store.storage, name)
    return counts.report(chunk, size, sha256)


class FinaliseStoppedError(JobsError):
    """Whoever wanted a job finished does not want it any more; nothing has been written."""


@dataclass
class Verified:
    """What is in those parts of a job that were found to be good; `errors` are the first of all rows that failed."""

    parts: dict[int, PartSummary] = field(default_factory=dict)
    errors: list[RowError] = field(default_factory=list)

    def add(self, report: PartReport) -> None:
        """Take a part for good."""
        self.parts[report.part.index] = report.part
        if report.errors:
            found = [*self.errors, *report.errors]
            self.errors = sorted(found, key=lambda error: error.index)[:MAX_LISTED_ERRORS]


def finalise(
    store: JobStore,
    job_id: str,
    *,
    read_all: bool,
    should_stop: Callable[[], bool] = lambda: False,
    verified: Verified | None = None,
) -> list[int]:
    """Write the manifest of a job whose parts are all there; does nothing if it is written already.

    Args:
        store: where the job is.
        job_id: which job.
        read_all: whether each part is read and compared with its digest, or only its footer is.
        should_stop: asked before each piece of a part is read, and before a part is deleted.
        verified: what an earlier call found to be good, which is not read again; this call adds to it.

    Returns:
        The chunks whose parts are missing or damaged, and have been deleted: they have to be done anew. None of them
        if the job has succeeded.

    Raises:
        FinaliseStoppedError: `should_stop` said yes.
    """
    files = store.files(job_id)
    if files.manifest is not None:
        return []
    good, bad = verified or Verified(), list[int]()

    def check(chunk: int) -> PartReport | None:
        if should_stop():
            raise FinaliseStoppedError
        return _verified(store, files.record, chunk, read_all=read_all, should_stop=should_stop)

    with ThreadPoolExecutor(_READERS, thread_name_prefix="verify") as pool:
        for first in range(0, files.record.num_chunks, _PARTS_AT_ONCE):  # a job may have a million
            some = range(first, min(first + _PARTS_AT_ONCE, files.record.num_chunks))
            unknown = [chunk for chunk in some if chunk not in good.parts]
            for chunk, report in zip(unknown, pool.map(check, unknown), strict=True):
                if report is None:
                    bad.append(chunk)
                else:
                    good.add(report)
    if should_stop():
        raise FinaliseStoppedError
    if not bad:
        store.write_manifest(job_id, _manifest(files.record, good))
        return []
    return [chunk for chunk in bad if _discarded(store, files.record, chunk, check)]


def _discarded(store: JobStore, record: JobRecord, chunk: int, check: Callable[[int], PartReport | None]) -> bool:
    """Delete a bad part -> whether its chunk is to be done anew. It may have been done since it was looked at."""
    if store.has_manifest(record.id) or check(chunk) is not None:
        return False
    store.discard_part(record.id, chunk)
    return True


def _verified(
    store: JobStore, record: JobRecord, chunk: int, *, read_all: bool, should_stop: Callable[[], bool]
) -> PartReport | None:
    """Return the report of a part if the part is what it says."""
    name = job_names(record.id).part(chunk)
    try:
        report = store.report(record.id, chunk)
        with _checked_footer(store.storage, name, record, report.part.rows):
            pass
        same = not read_all or _digest(store.storage, name, should_stop) == (report.part.bytes, report.part.sha256)
    except (FileNotFoundError, PartFormatError, PartNotReadyError, RecordFormatError):
        return None
    return report if same and store.storage.size(name) == report.part.bytes else None


@contextmanager
def _checked_footer(storage: Storage, name: str, record: JobRecord, num_rows: int) -> Iterator[pq.ParquetFile]:
    with storage.open(name) as file, closing(parse_part(file, name)) as part:
        header = read_header(part, name)
        if (header.fingerprint, header.dtype, header.layout) != (record.fingerprint, record.dtype, record.layout):
            raise PartFormatError(f"{name} was made by the encoder {header.fingerprint}, or with other options")
        if part.metadata.num_rows != num_rows:
            raise PartFormatError(f"{name} has {part.metadata.num_rows} rows, its chunk has {num_rows}")
        yield part


def _digest(storage: Storage, name: str, should_stop: Callable[[], bool] = lambda: False) -> tuple[int, str]:
    """Return size and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with storage.open(name) as file:
        while piece := file.read(_PIECE_BYTES):
            if should_stop():  # a part may have gigabytes
                raise FinaliseStoppedError
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()


def _manifest(record: JobRecord, verified: Verified) -> Manifest:
    parts = [verified.parts[chunk] for chunk in range(record.num_chunks)]
    return Manifest(
        job_id=record.id,
        fingerprint=record.fingerprint,
        finished_at=datetime.now(UTC),
        rows=sum(part.rows for part in parts),
        bytes=sum(part.bytes for part in parts),
        succeeded=sum(part.succeeded for part in parts),
        failed=sum(part.failed for part in parts),
        truncated=sum(part.truncated for part in parts),
        tokens=sum(part.tokens for part in parts),
        parts=parts,
        errors=verified.errors,
    )
