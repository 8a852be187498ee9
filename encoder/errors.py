"""What can go wrong in the encoder room.

EncoderError
├── EncoderConfigError     a setting of the encoder makes no sense
├── CheckpointError        a model folder or hub id holds no checkpoint that can be used
├── SelfCheckError         the fast path does not give this model's own numbers
├── PromptError            one prompt cannot be encoded; the others of its call can
├── DeadlineExceededError  a submission's deadline passed before it was encoded
├── EngineClosedError      the engine was closed before it came to a submission
└── DeviceFailedError      the device is in a state that only a new process gets it out of
"""

from __future__ import annotations


class EncoderError(Exception):
    """Base class of every error that the encoder raises on purpose."""


class EncoderConfigError(EncoderError, ValueError):
    """A field of an `EncoderConfig`, or an argument of `Encoder.load`, has a value that makes no sense."""


class CheckpointError(EncoderError):
    """A model folder or hub id holds no checkpoint that can be used; the message names it and what is missing."""


class SelfCheckError(EncoderError):
    """The fast path's rows differ from those of the plain padded forward; the message says which, and by how much."""


class PromptError(EncoderError, ValueError):
    """One prompt cannot be encoded.

    Attributes:
        position: where the prompt stands in the list that was given.
        reason: why it cannot be encoded.
    """

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"prompt {position}: {reason}")
        self.position = position
        self.reason = reason


class DeadlineExceededError(EncoderError):
    """A submission's deadline passed before all of it was on the device; the rest has cost no device time."""


class EngineClosedError(EncoderError):
    """The engine was closed before it came to this submission."""


class DeviceFailedError(EncoderError):
    """The device is in a state that only a new process gets it out of; the engine is closed."""
