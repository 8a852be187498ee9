"""How far a job got: what its files say, and what is shown of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from jobs.records import (
    ChunkFailure,
    JobRecord,
    JobStatus,
    JobView,
    Manifest,
    Mark,
    OptionsView,
    PartView,
)


@dataclass(frozen=True)
class Live:
    """What Redis tells of a job while it runs; nothing is lost without it.

    Attributes:
        rows: rows encoded so far, by chunk that is being worked on.
        trouble: why the job waits for its storage or encoder, if it does.
    """

    rows: Mapping[int, int]
    trouble: str | None = None


NOTHING_LIVE = Live({})


@dataclass(frozen=True)
class JobFiles:
    """What a job's files say.

    Attributes:
        record: what was asked.
        starts: position of each chunk's first prompt, and the number of prompts.
        parts: size in bytes of each part that counts.
        failures: by chunk.
        manifest: once all parts are there.
        cancelled: the mark, if there is one.
        expired: the mark, if there is one.
    """

    record: JobRecord
    starts: Sequence[int]
    parts: Mapping[int, int]
    failures: Mapping[int, ChunkFailure]
    manifest: Manifest | None
    cancelled: Mark | None
    expired: Mark | None

    @property
    def given_up(self) -> list[ChunkFailure]:
        """Failures of the chunks that used up their attempts, and have no part."""
        return [each for chunk, each in sorted(self.failures.items()) if each.gave_up and chunk not in self.parts]

    def status(self, live: Live = NOTHING_LIVE) -> JobStatus:
        """Return where the job stands."""
        if self.expired:
            return JobStatus.EXPIRED
        if self.manifest:
            return JobStatus.SUCCEEDED
        started = [chunk for chunk in live.rows if chunk not in self.parts]
        if self.cancelled:
            return JobStatus.CANCELLING if started else JobStatus.CANCELLED
        given_up = len(self.given_up)
        if given_up and given_up + len(self.parts) == self.record.num_chunks:
            return JobStatus.FAILED
        if live.trouble is not None:
            return JobStatus.PAUSED
        return JobStatus.RUNNING if self.parts or started else JobStatus.QUEUED

    def finished_at(self, status: JobStatus) -> datetime | None:
        """Return since when the job is in a final status; None if it is in none."""
        if self.manifest:
            return self.manifest.finished_at
        if status is JobStatus.FAILED:
            return max(failure.failed_at for failure in self.given_up)
        mark = self.cancelled or self.expired
        return mark.at if mark and status.is_final else None

    def view(self, live: Live = NOTHING_LIVE) -> JobView:
        """Return what is shown of the job."""
        record, manifest, status = self.record, self.manifest, self.status(live)
        done = sum(self._rows(chunk) for chunk in self.parts)
        working = sum(
            min(rows, self._rows(chunk))
            for chunk, rows in live.rows.items()
            if chunk not in self.parts and 0 <= chunk < record.num_chunks
        )
        parts = {} if status is JobStatus.EXPIRED else self.parts
        return JobView(
            id=record.id,
            status=status,
            created_at=record.created_at,
            finished_at=self.finished_at(status),
            num_prompts=record.num_prompts,
            num_done=done + (0 if status.is_final else working),
            num_failed=manifest.failed if manifest else None,
            num_truncated=manifest.truncated if manifest else None,
            num_parts=record.num_chunks,
            num_parts_done=len(self.parts),
            num_parts_failed=len(self.given_up),
            estimated_bytes=record.estimated_bytes,
            options=OptionsView(
                dtype=record.dtype,
                layout=record.layout,
                compression=record.compression,
                chunk_rows=record.chunk_rows,
                chunk_tokens=record.chunk_tokens,
                deduplicate=record.deduplicate,
            ),
            fingerprint=record.fingerprint,
            metadata=record.metadata,
            error=self._error(status, live),
            parts=[
                PartView(index=n, bytes=size, url=f"/jobs/{record.id}/parts/{n}") for n, size in sorted(parts.items())
            ],
        )

    def _rows(self, chunk: int) -> int:
        return self.starts[chunk + 1] - self.starts[chunk]

    def _error(self, status: JobStatus, live: Live) -> str | None:
        if status is JobStatus.PAUSED:
            return live.trouble
        if self.manifest or not self.given_up:
            return None
        first, others = self.given_up[0], len(self.given_up) - 1
        more = f" (and {others} more chunks)" if others else ""
        return f"chunk {first.chunk}, after {first.attempts + first.crashes} attempts: {first.error}{more}"
