"""Reads the files of jobs, and remembers what never changes."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Container, Sequence
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from jobs.errors import JobNotFoundError, RecordFormatError
from jobs.layout import JobNames, job_names, json_index, part_index
from jobs.rate import Reported
from jobs.records import ChunkFailure, ChunkStarts, JobRecord, Mark, OnError
from jobs.storage import Storage

_R = TypeVar("_R", bound=BaseModel)
_KNOWN_JOBS = 256
# All that there are, if that can be: whoever has few jobs looks through those of everybody for a page of them.
_KNOWN_OWNERS = 100_000
_RECENT_PARTS = 32
logger = logging.getLogger(__name__)


class Fixed(NamedTuple):
    """What of a job's record is asked for often."""

    owner: str | None
    on_error: OnError


class JobReader:
    """Reads the files of jobs in `storage`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        # Needed for every chunk of a job, or for every job of a list.
        self.starts = lru_cache(_KNOWN_JOBS)(self._starts)
        self.fixed = lru_cache(_KNOWN_OWNERS)(self._fixed)

    def read_or_none(self, name: str, kind: type[_R]) -> _R | None:
        """Return what a JSON file says, or None if it is not there.

        Raises:
            RecordFormatError: it cannot be read.
        """
        try:
            return kind.model_validate_json(self._storage.read(name))
        except FileNotFoundError:
            return None
        except ValidationError as exc:
            raise RecordFormatError(f"{name} is damaged, or of another version of layerstack: {_first(exc)}") from exc

    def record(self, job_id: str) -> JobRecord:
        """Return what was asked."""
        record = self.read_or_none(job_names(job_id).record, JobRecord)
        if record is None:
            raise JobNotFoundError(job_id)
        return record

    def exists(self, job_id: str) -> bool:
        """Whether there is such a job."""
        return self._storage.size(job_names(job_id).record) is not None

    def is_of(self, job_id: str, owner: str) -> bool:
        """Whether a job is an owner's; one that cannot be read is nobody's."""
        try:
            return self.fixed(job_id).owner == owner
        except JobNotFoundError:
            return False
        except RecordFormatError as exc:
            logger.error("the owner of a job is not known: %s", exc)  # noqa: TRY400 - the message says it all
            return False

    def parts(self, names: JobNames, starts: Sequence[int]) -> tuple[dict[int, int], list[Reported]]:
        """Return the size of each part that counts, and the parts that were reported last."""
        files = self._storage.files(names.parts_folder)
        reports = {n: file.modified_at for file in files if (n := json_index(file.name)) is not None}
        parts = {n: file.size for file in files if (n := part_index(file.name)) is not None and n in reports}
        last = heapq.nlargest(_RECENT_PARTS, (n for n in parts if n < len(starts) - 1), key=reports.__getitem__)
        return parts, [Reported(reports[n], starts[n + 1] - starts[n]) for n in last]

    def failures(self, names: JobNames, parts: Container[int]) -> dict[int, ChunkFailure]:
        """Return what went wrong with chunks that are not done; there may be many that went well in the end."""
        listed = [json_index(file.name) for file in self._storage.files(names.failures_folder)]
        read = {n: self.failure(names.failure(n)) for n in listed if n is not None and n not in parts}
        return {chunk: failure for chunk, failure in read.items() if failure is not None}

    def failure(self, name: str) -> ChunkFailure | None:
        """Return what a file says of a failure. One that cannot be read counts for nothing: it holds no rows."""
        try:
            return self.read_or_none(name, ChunkFailure)
        except RecordFormatError as exc:
            logger.error("attempts are counted anew: %s", exc)  # noqa: TRY400 - the message says it all
            return None

    def started(self, names: JobNames, written_at: datetime) -> Mark:
        """Return the mark that a job was begun. One that cannot be read tells so all the same, by its own time."""
        try:
            return self.read_or_none(names.started, Mark) or Mark(at=written_at)
        except RecordFormatError as exc:
            logger.error("when a job was begun is not known: %s", exc)  # noqa: TRY400 - the message says it all
            return Mark(at=written_at)

    def _starts(self, job_id: str) -> tuple[int, ...]:
        name = job_names(job_id).chunks
        found = self.read_or_none(name, ChunkStarts)
        if found is not None:
            return found.starts
        if self.exists(job_id):  # it must not be taken for an upload that was cut off, and deleted
            raise RecordFormatError(f"{name} is missing")
        raise JobNotFoundError(job_id)

    def _fixed(self, job_id: str) -> Fixed:
        record = self.record(job_id)
        return Fixed(record.owner, record.on_error)


def _first(error: ValidationError) -> str:
    """Return the first thing that pydantic found wrong, in one line."""
    first = error.errors()[0]
    return ": ".join([*(str(name) for name in first["loc"]), first["msg"]])
