"""How far a job got: what its files say, and what is shown of it."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from jobs.rate import Reported, overall_rate, recent_rate
from jobs.records import (
    ChunkFailure,
    JobRecord,
    JobStatus,
    JobView,
    Manifest,
    Mark,
    OptionsView,
    PartView,
    StateTimes,
)


@dataclass(frozen=True)
class Live:
    """What Redis tells of a job while it runs; nothing is lost without it.

    Attributes:
        rows: rows encoded so far, by chunk that is being worked on.
        trouble: why the job waits for its storage or encoder, if it does.
        queue_position: unfinished jobs that were made before it, if that is known.
    """

    rows: Mapping[int, int]
    trouble: str | None = None
    queue_position: int | None = None


NOTHING_LIVE = Live({})


@dataclass(frozen=True)
class Counts:
    """Rows of parts: with an embedding, without one, and of prompts that were cut to max_length."""

    succeeded: int
    failed: int
    truncated: int


@dataclass(frozen=True)
class JobFiles:
    """What a job's files say.

    Attributes:
        record: what was asked.
        starts: position of each chunk's first prompt, and the number of prompts.
        parts: size in bytes of each part that counts.
        failures: by chunk.
        manifest: once all parts are there.
        started: the mark, if there is one.
        cancelled: the mark, if there is one.
        expired: the mark, if there is one.
        reported: the parts that were reported last.
    """

    record: JobRecord
    starts: Sequence[int]
    parts: Mapping[int, int]
    failures: Mapping[int, ChunkFailure]
    manifest: Manifest | None
    started: Mark | None
    cancelled: Mark | None
    expired: Mark | None
    reported: Sequence[Reported] = ()

    @property
    def given_up(self) -> list[ChunkFailure]:
        """Failures of the chunks that used up their attempts, and have no part."""
        return [each for chunk, each in sorted(self.failures.items()) if each.gave_up and chunk not in self.parts]

    @property
    def exact_counts(self) -> Counts | None:
        """What the manifest counts, if there is one."""
        return Counts(self.manifest.succeeded, self.manifest.failed, self.manifest.truncated) if self.manifest else None

    def status(self, live: Live = NOTHING_LIVE) -> JobStatus:
        """Return where the job stands."""
        if self.expired:
            return JobStatus.EXPIRED
        if self.manifest:
            return JobStatus.SUCCEEDED
        under_way = any(chunk not in self.parts for chunk in live.rows)
        if self.cancelled:
            return JobStatus.CANCELLING if under_way else JobStatus.CANCELLED
        if self._has_failed():
            return JobStatus.FAILED
        if live.trouble is not None:
            return JobStatus.PAUSED
        return JobStatus.RUNNING if self.started or self.parts or under_way else JobStatus.QUEUED

    def finished_at(self, status: JobStatus) -> datetime | None:
        """Return since when the job is in a final status; None if it is in none."""
        if self.manifest:
            return self.manifest.finished_at
        if status is JobStatus.FAILED:
            return max(failure.failed_at for failure in self.given_up)
        mark = self.cancelled or self.expired
        return mark.at if mark and status.is_final else None

    def view(
        self,
        live: Live = NOTHING_LIVE,
        *,
        counts: Counts | None = None,
        parts_after: int | None = None,
        parts_limit: int = 100,
        now: datetime | None = None,
    ) -> JobView:
        """Return what is shown of the job.

        Args:
            live: what Redis tells.
            counts: what `JobStore.counts` knows of the finished parts.
            parts_after: show parts of a larger index only.
            parts_limit: how many parts to show at most.
            now: the time, if it is not that of the clock.
        """
        record, status = self.record, self.status(live)
        num_done = self._num_done(status, live)
        rate = self._rate(num_done, now or datetime.now(UTC)) if status is JobStatus.RUNNING else None
        parts = self._part_views(status, -1 if parts_after is None else parts_after, parts_limit + 1)
        shown = parts[:parts_limit]
        counts = self.exact_counts or counts
        return JobView(
            id=record.id,
            status=status,
            created_at=record.created_at,
            started_at=self.started.at if self.started else None,
            finished_at=self.finished_at(status),
            times=self._times(status),
            num_prompts=record.num_prompts,
            num_done=num_done,
            num_succeeded=counts.succeeded if counts else None,
            num_failed=counts.failed if counts else None,
            num_truncated=counts.truncated if counts else None,
            rate=rate,
            eta_s=(record.num_prompts - num_done) / rate if rate else None,
            queue_position=live.queue_position if status is JobStatus.QUEUED else None,
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
                on_error=record.on_error,
            ),
            fingerprint=record.fingerprint,
            metadata=record.metadata,
            error=self._error(status, live),
            parts=shown,
            parts_next=shown[-1].index if shown and len(parts) > len(shown) else None,
        )

    def part_view(self, chunk: int) -> PartView:
        """Return what is shown of a part that counts."""
        url = f"/jobs/{self.record.id}/parts/{chunk}"
        return PartView(index=chunk, rows=self._rows(chunk), bytes=self.parts[chunk], url=url)

    def _has_failed(self) -> bool:
        given_up = len(self.given_up)
        if given_up and self.record.on_error == "fail":
            return True
        return given_up > 0 and given_up + len(self.parts) == self.record.num_chunks

    def _num_done(self, status: JobStatus, live: Live) -> int:
        done = sum(self._rows(chunk) for chunk in self.parts)
        if status.is_final:
            return done
        return done + sum(
            min(rows, self._rows(chunk))
            for chunk, rows in live.rows.items()
            if chunk not in self.parts and 0 <= chunk < self.record.num_chunks
        )

    def _rate(self, num_done: int, now: datetime) -> float | None:
        reported = list(self.reported)
        # Chunks run side by side and end at nearly the same moment: the time between the first few tells little.
        if self.started and 1 < len(reported) == len(self.parts):
            reported.append(Reported(self.started.at, 0))
        lately = recent_rate(reported)
        if lately is None and self.started:
            return overall_rate(num_done, now - self.started.at)
        return lately

    def _times(self, status: JobStatus) -> StateTimes:
        cancelled = self.cancelled.at if self.cancelled else None
        has_stopped = self.manifest is None and status in {JobStatus.CANCELLED, JobStatus.EXPIRED}
        return StateTimes(
            queued=self.record.created_at,
            running=self.started.at if self.started else None,
            succeeded=self.manifest.finished_at if self.manifest else None,
            failed=self.finished_at(status) if status is JobStatus.FAILED else None,
            cancelling=cancelled,
            cancelled=cancelled if has_stopped else None,
            expired=self.expired.at if self.expired else None,
        )

    def _part_views(self, status: JobStatus, after: int, limit: int) -> list[PartView]:
        if status is JobStatus.EXPIRED:
            return []
        return list(map(self.part_view, heapq.nsmallest(limit, (chunk for chunk in self.parts if chunk > after))))

    def _rows(self, chunk: int) -> int:
        return self.starts[chunk + 1] - self.starts[chunk]

    def _error(self, status: JobStatus, live: Live) -> str | None:
        if status is JobStatus.PAUSED:
            return live.trouble
        if self.manifest or not self.given_up:
            return None
        first, others = self.given_up[0], len(self.given_up) - 1
        attempts = first.attempts + first.crashes
        more = f" (and {others} more chunks)" if others else ""
        return f"chunk {first.chunk}, after {attempts} attempt{'s' * (attempts != 1)}: {first.error}{more}"
