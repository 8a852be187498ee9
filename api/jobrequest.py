"""What POST /jobs asks for: prompts and options, as JSON or as a prompt file."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import IO, Annotated

from fastapi import Request
from pydantic import BeforeValidator, FailFast, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import from_json
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from api.problems import Problem, first_unknown_only, invalid, invalid_all
from api.uploads import Entry, PromptFile, recognise
from jobs.files import NO_ROOM
from jobs.records import JobOptions, StrictRecord

logger = logging.getLogger(__name__)

MAX_JSON_PROMPTS = 100_000
_MAX_METADATA = 16
_SPOOL_BYTES = 2**20
_FORM_FIELDS = ("file", "options")


def _known_options(value: object) -> object:
    return first_unknown_only(value, JobOptions.model_fields)


def _few(metadata: object) -> object:
    if isinstance(metadata, dict) and len(metadata) > _MAX_METADATA:
        raise ValueError(f"has at most {_MAX_METADATA} names, not {len(metadata)}")
    return metadata


_ShortText = Annotated[str, StringConstraints(max_length=512)]
# All limits hold before pydantic looks at what is in there: it would make an error of each of a million values.
_Prompts = Annotated[list[Entry], FailFast(), Field(max_length=MAX_JSON_PROMPTS)]
_Options = Annotated[JobOptions, BeforeValidator(_known_options)]
_Metadata = Annotated[dict[_ShortText, _ShortText], BeforeValidator(_few), Field(max_length=_MAX_METADATA)]


class JobRequest(StrictRecord):
    """The JSON body of POST /jobs."""

    prompts: _Prompts = Field(examples=[["a fox in the snow", {"id": "7", "prompt": "a red barn"}]])
    options: _Options = JobOptions()
    metadata: _Metadata = Field(default={})

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        return first_unknown_only(value, cls.model_fields)


def parse_request(content: bytes) -> JobRequest:
    """Return what a JSON body asks for.

    Raises:
        Problem: it is no JSON, or asks for something that there is not.
    """
    try:
        return JobRequest.model_validate(from_json(content))
    except ValidationError as exc:
        errors = exc.errors()
        if errors[0]["type"] == "too_long" and errors[0]["loc"] == ("prompts",):
            raise _too_many() from exc
        raise invalid_all(errors) from exc
    except ValueError as exc:
        raise invalid("body", content[:200], f"not valid JSON: {exc}") from exc


def parse_options(text: str | None) -> JobOptions:
    """Return the options that come as text beside a prompt file.

    Raises:
        Problem: they are no JSON, or none that there are.
    """
    try:
        return JobOptions.model_validate(_known_options(from_json(text))) if text else JobOptions()
    except ValidationError as exc:
        raise invalid_all([{**error, "loc": ("options", *error["loc"])} for error in exc.errors()]) from exc
    except ValueError as exc:
        raise invalid("options", text, f"not valid JSON: {exc}") from exc


@asynccontextmanager
async def uploaded(
    request: Request, media_type: str, options: str | None
) -> AsyncIterator[tuple[IO[bytes], PromptFile, JobOptions]]:
    """Open the prompt file of a request, with its kind and the options; what is large lies on disk.

    Args:
        request: its body is the file, or a form with the file.
        media_type: of the body.
        options: as the query has them; those of a form win.

    Raises:
        Problem: the body is none of that, or there is no room for it.
    """
    if media_type == "multipart/form-data":
        with _told_if_full():
            # Two of a kind are told apart from one that is unknown.
            form = await request.form(max_files=2, max_fields=2)
        try:
            yield _from_form(form, options)
        finally:
            await form.close()
    else:
        kind, chosen = _known_kind(None, media_type), parse_options(options)
        spool = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # noqa: SIM115 - closing may fail, see below
        try:
            with _told_if_full():
                async for piece in request.stream():
                    await run_in_threadpool(spool.write, piece)
                await run_in_threadpool(spool.seek, 0)
            yield spool, kind, chosen
        finally:
            with suppress(OSError):  # on a full disk, what could not be written is tried once more
                spool.close()


def _from_form(form: FormData, options: str | None) -> tuple[IO[bytes], PromptFile, JobOptions]:
    names = [name for name, _ in form.multi_items()]
    if unknown := sorted(set(names) - set(_FORM_FIELDS)):
        raise invalid("body", unknown[0], "a multipart upload has the fields 'file' and 'options' only")
    if twice := [name for name in _FORM_FIELDS if names.count(name) > 1]:
        detail = f"{twice[0]}: a multipart upload has one '{twice[0]}'; got {names.count(twice[0])}"
        raise Problem(422, "invalid-request", detail, field=twice[0], limit=1)
    upload = form.get("file")
    if not isinstance(upload, UploadFile):
        raise Problem(422, "invalid-request", "file: a multipart upload needs a file named 'file'", field="file")
    chosen = form.get("options", options)
    if not isinstance(chosen, str | None):
        raise invalid("options", chosen.filename, "must be text")
    return upload.file, _known_kind(upload.filename, upload.content_type), parse_options(chosen)


@contextmanager
def _told_if_full() -> Iterator[None]:
    """Tell a full folder for temporary files from a fault of ours."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in NO_ROOM:
            raise
        logger.warning("%s, where uploads are kept while they are read, is full: %s", tempfile.gettempdir(), exc)
        detail = "file: the server's folder for temporary files (TMPDIR) has no room for it"
        raise Problem(507, "temporary-folder-full", detail, field="file") from exc


def _too_many() -> Problem:
    detail = (
        f"prompts: a JSON body has at most {MAX_JSON_PROMPTS} prompts; "
        "a file, such as .jsonl with one on each line, has any number: in the body, or as a multipart upload"
    )
    return Problem(422, "invalid-request", detail, field="prompts", limit=MAX_JSON_PROMPTS, see="/jobs")


def _known_kind(filename: str | None, media_type: str | None) -> PromptFile:
    kind = recognise(filename, media_type)
    if kind is None:
        what = filename or media_type or "a body without Content-Type"
        detail = (
            f"{what}: neither application/json nor a prompt file: .txt (text/plain), .jsonl (application/jsonl), "
            ".csv (text/csv) or .parquet (application/vnd.apache.parquet)"
        )
        raise Problem(415, "unsupported-media-type", detail, field="file" if filename else "Content-Type")
    return kind
