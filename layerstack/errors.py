"""What a user of layerstack can run into.

LayerstackError
├── ServerUnreachableError   nobody answers at the URL
├── AnswerLostError          the connection broke after a job was sent: it may exist
├── ServerError              the server answered with a problem document
├── UnexpectedAnswerError    what answers is no server of ours, or its encoder changed between two answers
├── AddressError             a URL of a server, or an id of a job, is none
├── PromptsError             prompts to be submitted are none
├── JobEndedError            a job ended otherwise than succeeded
├── DownloadError            a downloaded part is not what the manifest says
├── ReadError                a path holds no parts, or not all of them, or damaged ones
├── RowFailedError           a row was not encoded; it has a reason instead of an embedding
├── RowNotFoundError         no row has this id or index, or several have
├── OptionError              an argument has a value that is not allowed
├── TokensError              a prompt's tokens cannot be told, as their tokenizer cannot be loaded
├── PlotError                a figure cannot be drawn
├── ExportError              an export cannot be written: no room, names that are none, another export in the folder
├── ApiKeyError              a key has characters that no key has
├── PromptFileError          a prompt file cannot be read; it names the line, the value and the limit
├── OfflineError             prompts cannot be encoded on this machine
│   └── OtherResultsError    the folder for the results has something else in it, which stays as it is
└── LocalStackError          the local stack cannot start
"""

from __future__ import annotations

from typing import Any

import httpx

from jobs.records import JobView

_PROBLEM = "urn:layerstack:problem:"


class LayerstackError(Exception):
    """Base class of every error raised on purpose here."""


class ServerUnreachableError(LayerstackError):
    """Nobody answers at the URL, or the connection broke.

    Attributes:
        was_sent: whether anything has reached the server, so that it may have done what it was asked for.
    """

    def __init__(self, message: str, *, was_sent: bool = False) -> None:
        super().__init__(message)
        self.was_sent = was_sent


class AnswerLostError(LayerstackError):
    """The connection broke after a job was sent, and before the server answered: the job may exist."""


class ServerError(LayerstackError):
    """The server answered with an error.

    Attributes:
        status: HTTP status.
        problem: the problem document (RFC 9457), empty if the answer was none.
        retry_after_s: seconds after which the same may work, if the server says so.
    """

    def __init__(self, status: int, problem: dict[str, Any], text: str, retry_after_s: float | None = None) -> None:
        super().__init__(problem.get("detail") or f"HTTP {status}: {text[:200]}")
        self.status = status
        self.problem = problem
        self.retry_after_s = retry_after_s

    @property
    def is_temporary(self) -> bool:
        """Whether the same may work later: the server is busy, or has a fault of its own."""
        return self.status == httpx.codes.TOO_MANY_REQUESTS or self.status >= httpx.codes.INTERNAL_SERVER_ERROR

    @property
    def kind(self) -> str:
        """The type of the problem without what all types begin with, "queue-full" say; empty if there is none."""
        return str(self.problem.get("type", "")).removeprefix(_PROBLEM)


class UnexpectedAnswerError(LayerstackError):
    """What answers is no server of ours, or of another version; or its encoder changed between two answers."""


class AddressError(LayerstackError, ValueError):
    """A URL of a server, or an id of a job, is none."""


class PromptsError(LayerstackError, ValueError):
    """Prompts to be submitted are none: a row without the column, or of another type; the message names it."""


class JobEndedError(LayerstackError):
    """A job ended otherwise than succeeded.

    Attributes:
        job: as it ended; None if it has been deleted.
    """

    def __init__(self, message: str, job: JobView | None) -> None:
        super().__init__(message)
        self.job = job


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


class RowNotFoundError(LayerstackError, KeyError):
    """No row has this id or index, or several have; the message says which."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


class OptionError(LayerstackError, ValueError):
    """An argument has a value that is not allowed, or that cannot be used here; the message names both."""


class TokensError(LayerstackError):
    """A prompt's tokens cannot be told, as their tokenizer cannot be loaded; the message says why."""


class PlotError(LayerstackError):
    """A figure cannot be drawn; the message says what is missing."""


class ExportError(LayerstackError):
    """An export cannot be written: no room, ids that are no file names, or another export in the folder."""


class ApiKeyError(LayerstackError, ValueError):
    """A key has characters that no key has; the message does not show it."""


class PromptFileError(LayerstackError, ValueError):
    """A prompt file cannot be read; the message names the file, the line, what is there and what is allowed."""


class OfflineError(LayerstackError):
    """Prompts cannot be encoded on this machine; the message says what is in the way, and what to do."""


class OtherResultsError(OfflineError):
    """The folder for the results has something else in it, which stays as it is; the message names what differs."""


class LocalStackError(LayerstackError):
    """The local stack cannot start; the message says what is in the way."""
