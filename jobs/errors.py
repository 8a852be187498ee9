"""What can go wrong in the language that the rooms share.

JobsError
├── SettingsError         an environment variable or option has a bad value
├── JobNotFoundError      no such job
├── PartNotFoundError     the job has no part of this number
├── PartNotReadyError     the part or the manifest is not there yet
├── NoPromptsError        a job without a single prompt
├── PartFormatError       a file is no part of ours, or damaged
└── TensorFormatError     bytes are no safetensors, or of an unknown dtype
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


class PartNotFoundError(JobsError, LookupError):
    """The job has no part of this number, and never will."""


class PartNotReadyError(JobsError, LookupError):
    """The part or the manifest is not there yet; the message tells the job's status."""


class NoPromptsError(JobsError, ValueError):
    """A job was asked for without a single prompt."""


class PartFormatError(JobsError, ValueError):
    """A file is no part that we wrote, or is damaged; the message names it and says what is wrong."""


class TensorFormatError(JobsError, ValueError):
    """Bytes are no safetensors, or hold a dtype we do not know."""
