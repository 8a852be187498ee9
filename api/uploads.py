"""Prompt files: one prompt a line as text, or one JSON value a line. Read line by line, so memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import PurePath
from typing import IO, Annotated

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from api.media_types import essence
from api.problems import Problem, invalid, invalid_all
from jobs.records import Prompt, StrictRecord

ID_MAX_CHARS = 512


class PromptFile(StrEnum):
    """The kinds of prompt files."""

    TXT = "txt"
    """UTF-8 text; each line is a prompt, an empty line the empty prompt, so that row i is line i."""
    JSONL = "jsonl"
    """Each line a JSON string or `{"id", "prompt"}`; blank lines are skipped."""


class PromptEntry(StrictRecord):
    """A prompt, with the caller's id for it if there is one."""

    id: str | None = None
    prompt: str


def _as_entry(value: object) -> object:
    """Let a string stand for an entry without an id, so that errors name no branch of a union."""
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        raise ValueError("must be a string or an object with 'prompt' and perhaps 'id'")  # noqa: TRY004 - for pydantic
    return value


Entry = Annotated[PromptEntry, BeforeValidator(_as_entry, json_schema_input_type=str | PromptEntry)]
_ENTRY = TypeAdapter[PromptEntry](Entry)
_BY_SUFFIX = {".txt": PromptFile.TXT, ".jsonl": PromptFile.JSONL, ".ndjson": PromptFile.JSONL}
_BY_MEDIA_TYPE = {
    "text/plain": PromptFile.TXT,
    "application/jsonl": PromptFile.JSONL,
    "application/jsonlines": PromptFile.JSONL,
    "application/x-ndjson": PromptFile.JSONL,
}


def recognise(filename: str | None, media_type: str | None) -> PromptFile | None:
    """Tell the kind of an upload by its name, or else by its media type; None if neither is known."""
    by_name = _BY_SUFFIX.get(PurePath(filename or "").suffix.lower())
    return by_name or _BY_MEDIA_TYPE.get(essence(media_type))


def read_prompts(file: IO[bytes], kind: PromptFile, max_chars: int) -> Iterator[Prompt]:
    """Yield the prompts of a file.

    Raises:
        Problem: a line is bad; it names the line, what is there and what is allowed.
    """
    parse = _parse_json if kind is PromptFile.JSONL else _parse_text
    index = 0
    for number, line in _lines(file, max_chars):
        if (entry := parse(line, number)) is not None:
            yield as_prompt(entry, index, f"line {number}", max_chars)
            index += 1


def as_prompt(entry: PromptEntry, index: int, field: str, max_chars: int) -> Prompt:
    """Give an entry its id, and check its lengths.

    Raises:
        Problem: prompt or id is too long; it names `field`, the length and the limit.
    """
    if len(entry.prompt) > max_chars:
        raise too_long(field, len(entry.prompt), max_chars)
    if entry.id is not None and len(entry.id) > ID_MAX_CHARS:
        raise invalid(f"{field}.id", entry.id, f"an id has at most {ID_MAX_CHARS} characters", limit=ID_MAX_CHARS)
    return Prompt(id=str(index) if entry.id is None else entry.id, prompt=entry.prompt)


def too_long(field: str, length: int, max_chars: int) -> Problem:
    """Return the 422 for a prompt of `length` characters."""
    detail = f"{field}: a prompt has at most {max_chars} characters; got {length}"
    return Problem(422, "prompt-too-long", detail, field=field, value=length, limit=max_chars)


def _lines(file: IO[bytes], max_chars: int) -> Iterator[tuple[int, str]]:
    """Yield numbered lines without their ends; none is held that is longer than a prompt can be."""
    # A character takes up to 4 bytes of UTF-8, and up to 12 as a JSON escape; what is left is for the JSON around it.
    max_bytes = 12 * (max_chars + ID_MAX_CHARS) + 1024
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes:
            raise Problem(
                422,
                "prompt-too-long",
                f"line {number}: longer than {max_bytes} bytes, and a prompt has at most {max_chars} characters",
                field=f"line {number}",
                limit=max_chars,
            )
        try:
            # "utf-8-sig" drops the byte order mark that some editors write at the very beginning.
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as exc:
            raise invalid(f"line {number}", line[:100], f"must be UTF-8 ({exc.reason} at byte {exc.start})") from exc
        yield number, text.removesuffix("\n").removesuffix("\r")


def _parse_text(line: str, _number: int) -> PromptEntry | None:
    return PromptEntry(prompt=line)


def _parse_json(line: str, number: int) -> PromptEntry | None:
    if not line.strip():
        return None
    try:
        return _ENTRY.validate_json(line)
    except ValidationError as exc:
        raise invalid_all([{**error, "loc": (f"line {number}", *error["loc"])} for error in exc.errors()]) from exc
