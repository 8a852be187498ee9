"""A new job, from whatever prompts lie in: a list, a file, an iterator, a `datasets.Dataset`."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO, Any

import anyio.to_thread
import httpx

from jobs.records import JobView
from layerstack.errors import AnswerLostError, PromptsError, ServerError, ServerUnreachableError
from layerstack.transport import Transport, record

Prompts = Path | Iterable[str | Mapping[str, Any]]
"""A prompt file, or prompts: each a string, or a row of named columns as those of a `datasets.Dataset`."""

_ROWS_AT_ONCE = 1000
# With these the server says that there is no such job, and will not be.
_ABOUT_THE_PROMPTS = {
    httpx.codes.REQUEST_ENTITY_TOO_LARGE,
    httpx.codes.UNSUPPORTED_MEDIA_TYPE,
    httpx.codes.UNPROCESSABLE_ENTITY,
}


async def submit(
    transport: Transport,
    prompts: Prompts,
    options: Mapping[str, Any],
    *,
    metadata: Mapping[str, str],
    prompt_column: str,
    id_column: str,
    timeout_s: float,
) -> JobView:
    """Make a job; `AsyncJobs.submit` says how.

    It is sent with an `Idempotency-Key`, so one whose answer got lost is sent again and is still one job. An iterator,
    which can be read only once, is not.
    """
    form = {"options": json.dumps(dict(options)), "metadata": json.dumps(dict(metadata))}
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    if not isinstance(prompts, Path):
        check_source("submit", prompts)
        headers["Content-Type"] = "application/jsonl"
    # The answer comes once all that was sent has been stored, however long that takes.
    timeout = httpx.Timeout(timeout_s, read=None)
    was_sent = False

    async def send() -> httpx.Response:
        nonlocal was_sent
        with ExitStack() as resources:
            if isinstance(prompts, Path):
                file = resources.enter_context(_opened(prompts))
                body: dict[str, Any] = {"files": {"file": (prompts.name, file)}, "data": form}
            else:
                body = {"content": _body(prompts, prompt_column, id_column), "params": form}
            try:
                return await transport.send_once("POST", "/jobs", headers=headers, timeout=timeout, **body)
            except ServerUnreachableError as exc:
                was_sent = was_sent or exc.was_sent
                raise

    try:
        if isinstance(prompts, Iterator):
            await transport.send("GET", "/encoder")  # if there is no worker yet, this waits, since what follows cannot
            response = await send()
        else:
            response = await transport.attempts(repeatable=True)(send)
    except (ServerUnreachableError, ServerError) as exc:
        if not was_sent or (isinstance(exc, ServerError) and exc.status in _ABOUT_THE_PROMPTS):
            raise
        raise AnswerLostError(
            f"the connection broke before the server answered, and then: {exc}; the job may exist all the same: look "
            "with `layerstack jobs list` before you send it again"
        ) from exc
    return record(JobView, response.content, transport.url)


def check_source(call: str, prompts: object) -> None:
    """Refuse what can be iterated over, but yields something else than prompts; `call` is what they were given to.

    Raises:
        TypeError: it is a string, a dictionary, or a table whose iteration gives the names of its columns.
    """
    if isinstance(prompts, str):
        raise TypeError(f"{call} takes a list of prompts or a pathlib.Path, not the string {prompts!r}")
    if isinstance(prompts, Mapping):  # a `datasets.DatasetDict` is one
        raise TypeError(f"{call} takes one list of prompts, not a dictionary of {', '.join(map(repr, prompts))}")
    if hasattr(prompts, "columns"):  # a table of pandas, Polars or Arrow
        raise TypeError(f"{call} takes prompts, not a {type(prompts).__name__}: choose a column of it")


def _opened(path: Path) -> IO[bytes]:
    if path.exists() and not path.is_file():
        raise PromptsError(f"{path} is no regular file; `layerstack jobs submit -` reads a pipe")
    return path.open("rb")


def as_line(position: int, row: object, prompt_column: str, id_column: str) -> str:
    """Return a line of JSON for a prompt, or for a row with a prompt and perhaps an id.

    Raises:
        PromptsError: it is neither; the message names the position, and the columns that there are.
    """
    if isinstance(row, str):
        return json.dumps(row)
    if not isinstance(row, Mapping):
        raise PromptsError(f"prompt {position} is of type {type(row).__name__}: a string is needed, or named columns")
    if prompt_column not in row:
        raise PromptsError(
            f"prompt {position} has no column {prompt_column!r}, but {', '.join(map(repr, row))}: "
            "name the right one as prompt_column"
        )
    prompt, id_ = row[prompt_column], row.get(id_column)
    if not isinstance(prompt, str):
        raise PromptsError(f"prompt {position}: column {prompt_column!r} has {prompt!r}, which is no string")
    return json.dumps({"prompt": prompt} if id_ is None else {"prompt": prompt, "id": str(id_)})


async def _body(prompts: Iterable[str | Mapping[str, Any]], prompt_column: str, id_column: str) -> AsyncIterator[bytes]:
    """Yield prompts as lines of JSON, a thousand at a time; they are read in a thread, which may take its time."""
    rows = enumerate(prompts)

    def next_lines() -> bytes:
        some = islice(rows, _ROWS_AT_ONCE)
        return b"".join(as_line(n, row, prompt_column, id_column).encode() + b"\n" for n, row in some)

    # One that waits, for a pipe or a queue, must not keep Ctrl-C waiting.
    while piece := await anyio.to_thread.run_sync(next_lines, abandon_on_cancel=True):
        yield piece
