"""What a user of layerstack can run into.

LayerstackError
├── ServerUnreachableError   nobody answers at the URL
├── AnswerLostError          the connection broke after a job was sent: it may exist
├── ServerError              the server answered with a problem document
├── DownloadError            a downloaded part is not what the manifest says
├── ReadError                a path holds no parts, or not all of them, or damaged ones
├── RowFailedError           a row was not encoded; it has a reason instead of an embedding
├── ApiKeyError              a key has characters that no key has
└── LocalStackError          the local stack cannot start
"""

from __future__ import annotations

from typing import Any


class LayerstackError(Exception):
    """Base class of every error raised on purpose here."""


class ServerUnreachableError(LayerstackError):
    """Nobody answers at the URL."""


class AnswerLostError(LayerstackError):
    """The connection broke after a job was sent, and before the server answered: the job may exist."""


class ServerError(LayerstackError):
    """The server answered with an error.

    Attributes:
        status: HTTP status.
        problem: the problem document (RFC 9457), empty if the answer was none.
    """

    def __init__(self, status: int, problem: dict[str, Any], text: str) -> None:
        super().__init__(problem.get("detail") or f"HTTP {status}: {text[:200]}")
        self.status = status
        self.problem = problem


class DownloadError(LayerstackError):
    """A downloaded part is not what the manifest says."""


class ReadError(LayerstackError):
    """A path holds no parts, or not all of them, or damaged ones; the message says which."""


class RowFailedError(LayerstackError, ValueError):
    """A row was not encoded.

    Attributes:
        index: position in the job's input.
        reason: why it was not encoded.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"row {index} has no embedding: {reason}")
        self.index = index
        self.reason = reason


class ApiKeyError(LayerstackError, ValueError):
    """A key has characters that no key has; the message does not show it."""


class LocalStackError(LayerstackError):
    """The local stack cannot start; the message says what is in the way."""
