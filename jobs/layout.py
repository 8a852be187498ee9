"""Where each file of a job is. `docs/file-format.md` shows the tree.

{storage}/jobs/{job_id}/
    job.json                what was asked; written once the prompts are there, so a job exists once this does
    prompts/00000.parquet   one file a chunk
    parts/00000.parquet     the chunk's result: written under a temporary name, then renamed
    failures/00000.json     why the chunk failed as a whole, and how often it was tried
    manifest.json           written last
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import JobNotFoundError
from jobs.records import ULID_PATTERN

_JOB_ID = re.compile(ULID_PATTERN)
_PART_NAME = re.compile(r"(\d{5,})\.parquet")


@dataclass(frozen=True)
class JobFolder:
    """The folder of one job."""

    path: Path

    @property
    def record(self) -> Path:
        """What was asked."""
        return self.path / "job.json"

    @property
    def manifest(self) -> Path:
        """What came out."""
        return self.path / "manifest.json"

    @property
    def parts(self) -> Path:
        """The folder of the results."""
        return self.path / "parts"

    @property
    def failures(self) -> Path:
        """The folder of what went wrong."""
        return self.path / "failures"

    def prompts(self, chunk: int) -> Path:
        """The prompts of a chunk."""
        return self.path / "prompts" / f"{chunk:05d}.parquet"

    def part(self, chunk: int) -> Path:
        """The result of a chunk."""
        return self.parts / f"{chunk:05d}.parquet"

    def failure(self, chunk: int) -> Path:
        """Why a chunk failed."""
        return self.failures / f"{chunk:05d}.json"


def jobs_folder(storage: Path) -> Path:
    """The folder of all jobs."""
    return storage / "jobs"


def demo_folder(storage: Path, family: str) -> Path:
    """The folder of the demo checkpoint of a model family."""
    return storage / f"demo-encoder-{family}"


def job_folder(storage: Path, job_id: str) -> JobFolder:
    """The folder of job `job_id`, which need not exist.

    Raises:
        JobNotFoundError: `job_id` is no job id, so no path is made from it.
    """
    if not _JOB_ID.fullmatch(job_id):
        raise JobNotFoundError(job_id)
    return JobFolder(jobs_folder(storage) / job_id)


def is_job_id(name: str) -> bool:
    """Whether a folder's name is a job id."""
    return _JOB_ID.fullmatch(name) is not None


def part_index(path: Path) -> int | None:
    """Return which part a file is, or None if it is none (a temporary file, say)."""
    found = _PART_NAME.fullmatch(path.name)
    return int(found[1]) if found else None
