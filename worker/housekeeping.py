"""Takes away what nobody needs: uploads that were cut off, temporary files of the dead, results whose time is up."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from jobs.layout import IDEMPOTENCY, job_names
from jobs.progress import JobFiles
from jobs.records import JobStatus
from jobs.store import JobStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Housekeeper:
    """Keeps the storage tidy.

    Attributes:
        store: what it tidies.
        retention: how long results stay after a job has finished; None for ever.
        abandoned_after: how long a job may be without `job.json` before its upload counts as cut off.
    """

    store: JobStore
    retention: timedelta | None
    abandoned_after: timedelta

    def remove_unfinished(self, job_id: str) -> None:
        """Remove temporary files whose writers have died."""
        names = job_names(job_id)
        folders = (names.folder, names.prompts_folder, names.parts_folder, names.failures_folder)
        if removed := sum(self.store.storage.remove_unfinished(folder) for folder in folders):
            logger.info("job %s: removed %d unfinished files of writers that died", job_id, removed)

    def remove_unfinished_markers(self) -> None:
        """Remove temporary files of markers whose writers have died."""
        if removed := self.store.storage.remove_unfinished(IDEMPOTENCY):
            logger.info("removed %d unfinished markers of writers that died", removed)

    def remove_abandoned(self, job_id: str) -> None:
        """Remove the folder of an upload that was cut off, or of a job that is being deleted."""
        names = job_names(job_id)
        changed = self.store.storage.last_change(names.folder)
        if changed is not None and datetime.now(UTC) - changed > self.abandoned_after:
            logger.info("job %s: removed what an upload that was cut off has left", job_id)
            self.store.storage.delete_folder(names.folder)

    def keeps(self, job_id: str, marks: Mapping[str, datetime]) -> bool:
        """Tell by a listing (`JobStore.marks`) whether a job has ended, and nothing is to be deleted of it yet."""
        names = job_names(job_id)
        ended_at = marks.get(names.manifest) or marks.get(names.cancelled)
        return ended_at is not None and names.expired not in marks and not self._is_over(ended_at)

    def expire(self, job_id: str, files: JobFiles) -> bool:
        """Delete the results of a finished job if its time is up -> whether they are gone."""
        if files.status() is not JobStatus.EXPIRED:
            # Once more: a job of many chunks takes long to read, and somebody may have had it retried since.
            if not (self._has_expired(files) and self._has_expired(self.store.files(job_id))):
                return False
            logger.info("job %s: its results have expired", job_id)
        self.store.expire(job_id)
        return True

    def _has_expired(self, files: JobFiles) -> bool:
        finished_at = files.finished_at(files.status())
        return finished_at is not None and self._is_over(finished_at)

    def _is_over(self, finished_at: datetime) -> bool:
        return self.retention is not None and datetime.now(UTC) - finished_at >= self.retention
