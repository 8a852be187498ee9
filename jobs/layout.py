"""What each file of a job is called. `docs/file-format.md` shows the tree.

jobs/{job_id}/
    job.json                what was asked; written once the prompts are there, so a job exists once this does
    chunks.json             the position of each chunk's first prompt, and the number of prompts
    prompts/00000.parquet   one file a chunk
    parts/00000.parquet     the chunk's result: it appears whole or not at all
    parts/00000.json        what is in it; written once it has been checked, so a part counts once this does
    failures/00000.json     why the chunk failed as a whole, and how often
    started, cancelled, expired     marks
    manifest.json           written last
idempotency/{digest}.json   which job an owner's `Idempotency-Key` has made
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from jobs.errors import JobNotFoundError
from jobs.records import ULID_PATTERN

JOBS = "jobs"
IDEMPOTENCY = "idempotency"
_JOB_ID = re.compile(ULID_PATTERN)
_NUMBERED = re.compile(r"(\d{5,})\.(parquet|json)")


@dataclass(frozen=True)
class JobNames:
    """The names of one job's files; `folder` is where they are, without a slash at the end."""

    folder: str

    @property
    def record(self) -> str:
        """What was asked."""
        return f"{self.folder}/job.json"

    @property
    def chunks(self) -> str:
        """How the prompts are cut into chunks."""
        return f"{self.folder}/chunks.json"

    @property
    def manifest(self) -> str:
        """What came out."""
        return f"{self.folder}/manifest.json"

    @property
    def started(self) -> str:
        """The mark that a chunk has been begun."""
        return f"{self.folder}/started"

    @property
    def cancelled(self) -> str:
        """The mark that the job is to stop."""
        return f"{self.folder}/cancelled"

    @property
    def expired(self) -> str:
        """The mark that the results are gone."""
        return f"{self.folder}/expired"

    @property
    def prompts_folder(self) -> str:
        """The folder of what goes in."""
        return f"{self.folder}/prompts"

    @property
    def parts_folder(self) -> str:
        """The folder of the results."""
        return f"{self.folder}/parts"

    @property
    def failures_folder(self) -> str:
        """The folder of what went wrong."""
        return f"{self.folder}/failures"

    def prompts(self, chunk: int) -> str:
        """The prompts of a chunk."""
        return f"{self.prompts_folder}/{chunk:05d}.parquet"

    def part(self, chunk: int) -> str:
        """The result of a chunk."""
        return f"{self.parts_folder}/{chunk:05d}.parquet"

    def report(self, chunk: int) -> str:
        """What is in the result of a chunk."""
        return f"{self.parts_folder}/{chunk:05d}.json"

    def failure(self, chunk: int) -> str:
        """Why a chunk failed."""
        return f"{self.failures_folder}/{chunk:05d}.json"


def job_names(job_id: str) -> JobNames:
    """The names of the files of job `job_id`, which need not exist.

    Raises:
        JobNotFoundError: `job_id` is no job id, so no name is made from it.
    """
    if not is_job_id(job_id):
        raise JobNotFoundError(job_id)
    return JobNames(f"{JOBS}/{job_id}")


def idempotency_digest(owner: str | None, key: str) -> str:
    """Return what an `Idempotency-Key` of an owner is called here: any text may be a key, not any text a file name."""
    return hashlib.sha256(json.dumps([owner, key]).encode()).hexdigest()


def idempotency_marker(digest: str) -> str:
    """The name of the marker that tells which job a key has made."""
    return f"{IDEMPOTENCY}/{digest}.json"


def is_job_id(name: str) -> bool:
    """Whether a folder's name is a job id."""
    return _JOB_ID.fullmatch(name) is not None


def part_index(name: str) -> int | None:
    """Return which part a Parquet file is, or None if it is none (a temporary file, say)."""
    return _index(name, ".parquet")


def json_index(name: str) -> int | None:
    """Return which chunk a JSON file is about, or None if it is about none."""
    return _index(name, ".json")


def _index(name: str, suffix: str) -> int | None:
    found = _NUMBERED.fullmatch(name)
    return int(found[1]) if found and PurePosixPath(name).suffix == suffix else None
