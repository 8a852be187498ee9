"""What can go wrong in the language that the rooms share.

JobsError
├── SettingsError         an environment variable or option has a bad value
├── JobNotFoundError      no such job
├── JobStateError         the job is in a state that does not allow what is asked
├── PartNotFoundError     the job has no part of this number
├── PartNotReadyError     the part or the manifest is not there yet
├── ResultsExpiredError   the results were deleted when their time was up
├── NoPromptsError        a job without a single prompt
├── NotEnoughSpaceError   the results of a job would not fit into the storage
├── RecordFormatError     a file of a job is damaged, missing, or of another version
├── PartFormatError       a file is no part of ours, or damaged
├── TensorFormatError     bytes are no safetensors, or of an unknown dtype
└── StorageError          the storage failed; the same may work later
    └── StorageFullError  nothing more fits into it
"""

from __future__ import annotations


class JobsError(Exception):
    """Base class of every error raised on purpose here."""


class SettingsError(JobsError, ValueError):
    """An environment variable has a bad value; the message names both."""


class JobNotFoundError(JobsError, LookupError):
    """There is no job of this id."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"no job {job_id!r}")
        self.job_id = job_id


class JobStateError(JobsError):
    """The job is in a state that does not allow what is asked; the message tells the state."""


class PartNotFoundError(JobsError, LookupError):
    """The job has no part of this number, and never will."""


class PartNotReadyError(JobsError, LookupError):
    """The part or the manifest is not there yet; the message tells the job's status."""


class ResultsExpiredError(JobsError, LookupError):
    """The results were deleted when their time was up; the record of the job stays."""


class NoPromptsError(JobsError, ValueError):
    """A job was asked for without a single prompt."""


class NotEnoughSpaceError(JobsError):
    """The results of a job would not fit into the storage.

    Attributes:
        needed_bytes: estimate for the results, at least.
        free_bytes: what the storage has left.
        reserve_bytes: how much of that has to stay free.
    """

    def __init__(self, needed_bytes: int, free_bytes: int, reserve_bytes: int) -> None:
        super().__init__(
            f"the results would take about {needed_bytes} bytes or more; the storage has {free_bytes} free, of which "
            f"{reserve_bytes} have to stay free (LAYERSTACK_STORAGE_RESERVE_BYTES)"
        )
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        self.reserve_bytes = reserve_bytes

    @property
    def room_bytes(self) -> int:
        """What the results may take."""
        return max(0, self.free_bytes - self.reserve_bytes)


class RecordFormatError(JobsError, ValueError):
    """A file of a job is damaged, missing, or of a version that we do not know; the message names it."""


class PartFormatError(JobsError, ValueError):
    """A file is no part that we wrote, or is damaged; the message names it and says what is wrong."""


class TensorFormatError(JobsError, ValueError):
    """Bytes are no safetensors, or hold a dtype we do not know."""


class StorageError(JobsError):
    """The storage failed; the message names the file and the fault. The same may work later."""


class StorageFullError(StorageError):
    """Nothing more fits into the storage, or into the caller's share of it."""
