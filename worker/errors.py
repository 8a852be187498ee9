"""What can go wrong in the worker room.

WorkerError
├── ChunkStoppedError              work on a chunk ends before its part is written, and nobody is to blame
│   ├── HandedBackError            the worker is stopping; the chunk goes back to the queue
│   ├── JobCancelledError          the job is cancelled, deleted, or has failed already
│   └── LeaseLostError             another worker has taken the chunk over
├── PromptFailedError              a prompt failed on its own, of a job that is to fail then
├── FingerprintMismatchError       the job was made for another encoder than this worker's
└── DeviceLostError                the device failed while it worked on the chunk, perhaps because of it
"""

from __future__ import annotations


class WorkerError(Exception):
    """Base class of every error that the worker raises on purpose."""


class ChunkStoppedError(WorkerError):
    """Work on a chunk ends before its part is written, and nobody is to blame."""


class HandedBackError(ChunkStoppedError):
    """The worker is stopping; the chunk goes back to the queue unfinished."""


class JobCancelledError(ChunkStoppedError):
    """The job is cancelled, deleted, or has failed already."""


class LeaseLostError(ChunkStoppedError):
    """This worker gave no sign of life for so long that another has taken the chunk over."""


class PromptFailedError(WorkerError):
    """A prompt failed on its own, of a job that is to fail then; the message names the prompt and the reason."""


class FingerprintMismatchError(WorkerError):
    """The job was made for another encoder than this worker's, whose rows would not fit the others."""


class DeviceLostError(WorkerError):
    """The device failed while it worked on the chunk: this worker is as good as dead, perhaps of the chunk."""
