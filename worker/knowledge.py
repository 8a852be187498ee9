"""What the reconciler has learned since it leads: which jobs there are, and how they stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from jobs.layout import job_names
from jobs.progress import JobFiles
from jobs.records import JobRecord, JobStatus
from worker.schedule import Schedule


@dataclass
class ActiveJob:
    """A job that is not finished."""

    record: JobRecord
    schedule: Schedule
    has_started: bool = False

    @classmethod
    def of(cls, record: JobRecord) -> ActiveJob:
        """Return a job of which nothing but the record is known."""
        return cls(record, Schedule(record.num_chunks, stops_at_failure=record.on_error == "fail"))

    def learn(self, files: JobFiles) -> None:
        """Take over what the files say."""
        self.schedule.learn(files.parts, [failure.chunk for failure in files.given_up])
        self.has_started = files.status() is JobStatus.RUNNING


@dataclass(frozen=True)
class FinishedJob:
    """A job that has finished: how, and when to look at it again."""

    status: JobStatus
    look_again: float


@dataclass
class Knowledge:
    """What the reconciler has learned. Times are of the monotonic clock.

    Attributes:
        active: jobs that are not finished.
        finished: those that are.
        expired: jobs of which nothing is left to delete.
        encoders: fingerprints that living workers have loaded.
        num_workers: that live.
        to_scan: jobs to be looked at, the next one last.
        has_scanned: whether all jobs have been looked at.
        has_news: whether there is a new job since the overview was told.
        scan_s: seconds that the scan under way has taken.
        next_scan: when the next one is due.
        next_search: when the next search for lost chunks is due.
    """

    active: dict[str, ActiveJob] = field(default_factory=dict)
    finished: dict[str, FinishedJob] = field(default_factory=dict)
    expired: set[str] = field(default_factory=set)
    encoders: set[str] = field(default_factory=set)
    num_workers: int = 1
    to_scan: list[str] = field(default_factory=list)
    has_scanned: bool = False
    has_news: bool = False
    scan_s: float = 0.0
    next_scan: float = 0.0
    next_search: float = 0.0

    def begin_scan(self, found: Collection[str], now: float) -> None:
        """Take over which jobs there are, and choose those to be looked at: the newest first."""
        for gone in self.active.keys() - found:
            del self.active[gone]
        self.finished = {job_id: job for job_id, job in self.finished.items() if job_id in found}
        self.expired.intersection_update(found)
        self.to_scan = sorted(
            job_id for job_id in found if job_id not in self.finished or self.finished[job_id].look_again <= now
        )

    def forget(self, job_id: str) -> None:
        """Take it that there is no such job."""
        self.active.pop(job_id, None)
        self.finished.pop(job_id, None)

    def queue(self) -> list[str]:
        """Return the jobs that are not finished, oldest first."""
        return sorted(self.active)

    def counts(self, troubled: Collection[str]) -> Mapping[JobStatus, int]:
        """Return how many jobs there are of each status, if those in `troubled` wait for something."""
        found = Counter(job.status for job in self.finished.values())
        for job_id, job in self.active.items():
            started = JobStatus.RUNNING if job.has_started else JobStatus.QUEUED
            found[JobStatus.PAUSED if job_id in troubled else started] += 1
        return found


def status_told_by(job_id: str, marks: Mapping[str, datetime]) -> JobStatus:
    """Return how a job has ended, of which the listing alone says that it has."""
    names = job_names(job_id)
    if names.expired in marks:
        return JobStatus.EXPIRED
    return JobStatus.SUCCEEDED if names.manifest in marks else JobStatus.CANCELLED
