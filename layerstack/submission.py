"""A new job, from whatever prompts lie in: a list, a file, an iterator, a `datasets.Dataset`."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx

from jobs.records import JobView
from layerstack.errors import AnswerLostError, PromptsError, ServerUnreachableError
from layerstack.transport import Transport

Prompts = Path | Iterable[str | Mapping[str, Any]]
"""A prompt file, or prompts: each a string, or a row of named columns as those of a `datasets.Dataset`."""

_ROWS_AT_ONCE = 1000


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
    once = isinstance(prompts, Iterator)
    arguments: dict[str, Any] = {
        "headers": {"Idempotency-Key": str(uuid.uuid4())},
        # The answer comes once all that was sent has been stored, however long that takes.
        "timeout": httpx.Timeout(timeout_s, read=None),
        "repeatable": not once,
    }
    with ExitStack() as resources:
        if isinstance(prompts, Path):
            file = resources.enter_context(prompts.open("rb"))
            arguments |= {"files": {"file": (prompts.name, file)}, "data": form}
        else:
            check_source(prompts)
            arguments["headers"]["Content-Type"] = "application/jsonl"
            arguments |= {"content": lambda: _body(prompts, prompt_column, id_column), "params": form}
        try:
            return JobView.model_validate(await transport.json("POST", "/jobs", **arguments))
        except ServerUnreachableError as exc:
            if not exc.was_sent:
                raise
            raise AnswerLostError(
                f"{exc}; the job may exist all the same: look with `layerstack jobs list` before you send it again"
            ) from exc


def check_source(prompts: object) -> None:
    """Refuse what can be iterated over, but yields something else than prompts.

    Raises:
        TypeError: it is a string, a dictionary, or a table whose iteration gives the names of its columns.
    """
    if isinstance(prompts, str):
        raise TypeError(f"submit takes a list of prompts or a pathlib.Path, not the string {prompts!r}")
    if isinstance(prompts, Mapping):  # a `datasets.DatasetDict` is one
        raise TypeError(f"submit takes one list of prompts, not a dictionary of {', '.join(map(repr, prompts))}")
    if hasattr(prompts, "columns"):  # a table of pandas, Polars or Arrow
        raise TypeError(f"submit takes prompts, not a {type(prompts).__name__}: choose a column of it")


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

    while piece := await anyio.to_thread.run_sync(next_lines):
        yield piece
