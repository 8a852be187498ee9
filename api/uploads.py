"""Prompt files of all kinds: text, JSON lines, CSV and Parquet. Read piece by piece, so memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import PurePath
from typing import IO, Annotated

from pydantic import BeforeValidator, TypeAdapter, ValidationError
from pydantic_core import from_json

from api.csvfile import MAX_BLANK_LINES, read_csv
from api.lines import read_lines
from api.media_types import essence
from api.parquetfile import read_parquet
from api.problems import Problem, first_unknown_only, invalid, invalid_all
from jobs.records import Prompt, StrictRecord

ID_MAX_CHARS = 512


class PromptFile(StrEnum):
    """The kinds of prompt files."""

    TXT = "txt"
    """UTF-8 text; each line is a prompt, an empty line the empty prompt, so that row i is line i."""
    JSONL = "jsonl"
    """Each line a JSON string or `{"id", "prompt"}`; blank lines are skipped."""
    CSV = "csv"
    """A header, then a prompt a row; an empty cell is the empty prompt, or no id."""
    PARQUET = "parquet"
    """A prompt a row, ids as text or whole numbers."""


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
    return first_unknown_only(value, PromptEntry.model_fields)


Entry = Annotated[PromptEntry, BeforeValidator(_as_entry, json_schema_input_type=str | PromptEntry)]
_ENTRY = TypeAdapter[PromptEntry](Entry)
_BY_SUFFIX = {
    ".txt": PromptFile.TXT,
    ".jsonl": PromptFile.JSONL,
    ".ndjson": PromptFile.JSONL,
    ".csv": PromptFile.CSV,
    ".parquet": PromptFile.PARQUET,
}
_BY_MEDIA_TYPE = {
    "text/plain": PromptFile.TXT,
    "application/jsonl": PromptFile.JSONL,
    "application/jsonlines": PromptFile.JSONL,
    "application/x-ndjson": PromptFile.JSONL,
    "text/csv": PromptFile.CSV,
    "application/vnd.apache.parquet": PromptFile.PARQUET,
    "application/x-parquet": PromptFile.PARQUET,
}


def recognise(filename: str | None, media_type: str | None) -> PromptFile | None:
    """Tell the kind of an upload by its name, or else by its media type; None if neither is known."""
    by_name = _BY_SUFFIX.get(PurePath(filename or "").suffix.lower())
    return by_name or _BY_MEDIA_TYPE.get(essence(media_type))


def read_prompts(file: IO[bytes], kind: PromptFile, max_chars: int) -> Iterator[Prompt]:
    """Yield the prompts of a file.

    Raises:
        Problem: a line, a row or the file is bad; it names which, what is there and what is allowed.
    """
    place = "row" if kind is PromptFile.PARQUET else "line"
    for index, (number, id_, text) in enumerate(_rows(file, kind, max_chars)):
        yield _prompt(id_, text, index, f"{place} {number}", max_chars)


def as_prompt(entry: PromptEntry, index: int, field: str, max_chars: int) -> Prompt:
    """Give an entry its id, and check its lengths.

    Raises:
        Problem: prompt or id is too long; it names `field`, the length and the limit.
    """
    return _prompt(entry.id, entry.prompt, index, field, max_chars)


def too_long(field: str, length: int, max_chars: int) -> Problem:
    """Return the 422 for a prompt of `length` characters."""
    detail = f"{field}: a prompt has at most {max_chars} characters; got {length}"
    return Problem("prompt-too-long", detail, field=field, value=length, limit=max_chars)


def _prompt(id_: str | None, text: str, index: int, field: str, max_chars: int) -> Prompt:
    if len(text) > max_chars:
        raise too_long(field, len(text), max_chars)
    if id_ is not None and len(id_) > ID_MAX_CHARS:
        raise invalid(f"{field}.id", id_, f"an id has at most {ID_MAX_CHARS} characters", limit=ID_MAX_CHARS)
    return Prompt(id=str(index) if id_ is None else id_, prompt=text)


def _rows(file: IO[bytes], kind: PromptFile, max_chars: int) -> Iterator[tuple[int, str | None, str]]:
    """Yield the number of a line or row, its id if it has one, and its prompt; of any length."""
    if kind is PromptFile.PARQUET:
        return read_parquet(file, value_max_bytes=4 * max(max_chars, ID_MAX_CHARS), max_chars=max_chars)
    # A character takes up to 4 bytes of UTF-8, and up to 12 as a JSON escape; what is left is for what is around it.
    max_bytes = 12 * (max_chars + ID_MAX_CHARS) + 1024
    lines = read_lines(file, max_bytes=max_bytes, max_chars=max_chars)
    if kind is PromptFile.CSV:
        return read_csv(lines, row_max_chars=max_bytes, max_chars=max_chars)
    return _read_json(lines) if kind is PromptFile.JSONL else _read_text(lines)


def _read_text(lines: Iterator[str]) -> Iterator[tuple[int, str | None, str]]:
    for number, line in enumerate(lines, start=1):
        yield number, None, _without_end(line)


def _read_json(lines: Iterator[str]) -> Iterator[tuple[int, str | None, str]]:
    blank = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            blank += 1
            if blank > MAX_BLANK_LINES:
                raise invalid(f"line {number}", "", f"at most {MAX_BLANK_LINES} lines are blank", limit=MAX_BLANK_LINES)
            continue
        # pydantic takes several times as long as its own parser, so it sees only what is not plainly right.
        if (plain := _plain_entry(line)) is not None:
            yield number, *plain
        else:
            entry = _validated(_without_end(line), number)
            yield number, entry.id, entry.prompt


def _plain_entry(line: str) -> tuple[str | None, str] | None:
    """Return id and prompt of a line that is right; None if it is wrong, or may be."""
    try:
        value = from_json(line)
    except ValueError:
        return None
    if isinstance(value, str):
        return None, value
    if not isinstance(value, dict):
        return None
    id_, prompt = value.pop("id", None), value.pop("prompt", None)
    is_right = not value and isinstance(prompt, str) and (id_ is None or isinstance(id_, str))
    return (id_, prompt) if is_right else None


def _validated(line: str, number: int) -> PromptEntry:
    try:
        return _ENTRY.validate_json(line)
    except ValidationError as exc:
        raise invalid_all([{**error, "loc": (f"line {number}", *error["loc"])} for error in exc.errors()]) from exc


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")
