"""What can go wrong in the encoder room.

EncoderError
├── EncoderConfigError   a setting of the encoder makes no sense
├── CheckpointError      a model folder or hub id holds no checkpoint that can be used
├── ConstantRowsError    pad or prefix rows depend on the prompt, so own rows alone would not be exact
└── PromptError          one prompt cannot be encoded; the others of its call can
"""

from __future__ import annotations


class EncoderError(Exception):
    """Base class of every error that the encoder raises on purpose."""


class EncoderConfigError(EncoderError, ValueError):
    """A field of an `EncoderConfig`, or an argument of `Encoder.load`, has a value that makes no sense."""


class CheckpointError(EncoderError):
    """A model folder or hub id holds no checkpoint that can be used; the message names it and what is missing."""


class ConstantRowsError(EncoderError):
    """Pad or prefix rows differ between prompts, so that storing own rows alone would not be exact."""


class PromptError(EncoderError, ValueError):
    """One prompt cannot be encoded.

    Attributes:
        position: where the prompt stands in the list that was given to `Encoder.encode`.
        reason: why it cannot be encoded.
    """

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"prompt {position}: {reason}")
        self.position = position
        self.reason = reason
