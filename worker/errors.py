"""What can go wrong in the worker room.

WorkerError
├── HandedBackError            the worker is stopping; the chunk goes back to the queue
└── FingerprintMismatchError   the job was made for another encoder than this worker's
"""

from __future__ import annotations


class WorkerError(Exception):
    """Base class of every error that the worker raises on purpose."""


class HandedBackError(WorkerError):
    """The worker is stopping; the chunk goes back to the queue unfinished."""


class FingerprintMismatchError(WorkerError):
    """The job was made for another encoder than this worker's, whose rows would not fit the others."""
