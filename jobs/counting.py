"""How many rows of a job's finished parts have an embedding, failed, or are of prompts that were cut."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

from jobs.errors import PartNotReadyError, RecordFormatError
from jobs.progress import Counts, JobFiles
from jobs.records import PartReport

logger = logging.getLogger(__name__)
MAX_COUNTED_PARTS = 1000
"""A job that has more finished parts is counted by its manifest only."""
_KNOWN_JOBS = 64
_READERS = 8


class _Part(NamedTuple):
    """A part that has been counted; `bytes` tells whether it has been done anew since."""

    bytes: int
    counts: Counts


class PartCounter:
    """Reads each report once, and remembers what the parts of a few jobs have. Thread-safe.

    Args:
        read: reads the report of a part, by job id and chunk.
    """

    def __init__(self, read: Callable[[str, int], PartReport]) -> None:
        self._read = read
        self._known = lru_cache(_KNOWN_JOBS)(_nothing)

    def counts(self, files: JobFiles) -> Counts | None:
        """Return the rows of all finished parts, or None if there are too many parts to read their reports.

        Raises:
            StorageError: the storage failed.
        """
        if files.manifest is not None:
            return files.exact_counts
        if files.expired is not None or len(files.parts) > MAX_COUNTED_PARTS:
            return None
        known = self._known(files.record.id)
        unknown = [chunk for chunk, size in files.parts.items() if chunk not in known or known[chunk].bytes != size]
        if unknown:
            with ThreadPoolExecutor(min(_READERS, len(unknown)), thread_name_prefix="reports") as pool:
                found = pool.map(lambda chunk: self._count(files.record.id, chunk), unknown)
                known |= {chunk: part for chunk, part in zip(unknown, found, strict=True) if part is not None}
        counted = [known[chunk].counts for chunk in files.parts if chunk in known]
        return Counts(
            succeeded=sum(each.succeeded for each in counted),
            failed=sum(each.failed for each in counted),
            truncated=sum(each.truncated for each in counted),
        )

    def _count(self, job_id: str, chunk: int) -> _Part | None:
        """Count a part; one whose report has gone or is damaged counts for nothing, and is found when the job ends."""
        try:
            part = self._read(job_id, chunk).part
        except (PartNotReadyError, RecordFormatError) as exc:
            logger.warning("part %d of job %s is not counted: %s", chunk, job_id, exc)
            return None
        return _Part(part.bytes, Counts(part.succeeded, part.failed, part.truncated))


def _nothing(_job_id: str) -> dict[int, _Part]:
    return {}
