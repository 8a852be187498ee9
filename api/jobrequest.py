"""What POST /jobs asks for: prompts and options, as JSON or as a prompt file."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Annotated, Any

from fastapi import Request
from pydantic import BeforeValidator, FailFast, Field, StringConstraints, TypeAdapter, ValidationError, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from api.compressed import Coding, content_coding, expanded, file_coding
from api.jsonbody import load, load_text, validated
from api.problems import Problem, first_unknown_only, invalid, invalid_all
from api.uploads import Entry, PromptFile, read_prompts, recognise
from jobs.files import NO_ROOM
from jobs.records import JobOptions, Prompt, StrictRecord
from jobs.settings import Settings

logger = logging.getLogger(__name__)

MAX_JSON_PROMPTS = 100_000
MAX_METADATA = 16
_SPOOL_BYTES = 2**20
_PIECE_BYTES = 2**20
_FORM_FIELDS = ("file", "options", "metadata")


def _known_options(value: object) -> object:
    return first_unknown_only(value, JobOptions.model_fields)


def _few(metadata: object) -> object:
    if isinstance(metadata, dict) and len(metadata) > MAX_METADATA:
        raise ValueError(f"has at most {MAX_METADATA} names, not {len(metadata)}")
    return metadata


_ShortText = Annotated[str, StringConstraints(max_length=512)]
# All limits hold before pydantic looks at what is in there: it would make an error of each of a million values.
_Prompts = Annotated[list[Entry], FailFast(), Field(max_length=MAX_JSON_PROMPTS)]
_Options = Annotated[JobOptions, BeforeValidator(_known_options)]
_Metadata = Annotated[dict[_ShortText, _ShortText], BeforeValidator(_few), Field(max_length=MAX_METADATA)]
_OPTIONS = TypeAdapter[JobOptions](_Options)
_METADATA = TypeAdapter[dict[str, str]](_Metadata, config={"strict": True})


class JobRequest(StrictRecord):
    """The JSON body of POST /jobs."""

    prompts: _Prompts = Field(examples=[["a fox in the snow", {"id": "7", "prompt": "a red barn"}]])
    options: _Options = JobOptions()
    metadata: _Metadata = Field(default={})

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        return first_unknown_only(value, cls.model_fields)


@dataclass(frozen=True)
class PromptUpload:
    """A prompt file, and what it is to become.

    Attributes:
        file: what was sent, at its beginning.
        kind: of its content.
        coding: how it is compressed, if it is.
        options: of the job.
        metadata: of the job.
        field: what errors of the file as a whole name.
    """

    file: IO[bytes]
    kind: PromptFile
    coding: Coding | None
    options: JobOptions
    metadata: dict[str, str]
    field: str

    def prompts(self, settings: Settings) -> Iterator[Prompt]:
        """Yield the prompts.

        Raises:
            Problem: a line, a row or the file is bad; it names which, what is there and what is allowed.
        """
        limit = settings.upload_max_expanded_bytes
        content = expanded(self.file, self.coding, max_bytes=limit, field=self.field)
        if self.coding is None or self.kind is not PromptFile.PARQUET:
            yield from read_prompts(content, self.kind, settings.prompt_max_chars)
            return
        with _spool() as seekable:  # the footer of Parquet is at its end
            with _told_if_full():
                while piece := content.read(_PIECE_BYTES):
                    seekable.write(piece)
                seekable.seek(0)
            yield from read_prompts(seekable, self.kind, settings.prompt_max_chars)


def parse_request(content: bytes, *, content_encoding: str | None, max_bytes: int) -> JobRequest:
    """Return what a JSON body asks for; see `api.jsonbody.parse`.

    Raises:
        Problem: it is no JSON, or asks for something that there is not.
    """
    value = load(content, content_encoding=content_encoding, max_bytes=max_bytes)
    prompts = value.get("prompts") if isinstance(value, dict) else None
    if isinstance(prompts, list) and len(prompts) > MAX_JSON_PROMPTS:
        raise _too_many()
    return validated(JobRequest, value)


def at_most(prompts: Iterable[Prompt], limit: int) -> Iterator[Prompt]:
    """Yield `prompts`.

    Raises:
        Problem: 413, there are more than `limit`.
    """
    for count, prompt in enumerate(prompts, start=1):
        if count > limit:
            detail = f"prompts: a job has at most {limit} prompts; this has more"
            raise Problem("too-many-prompts", detail, field="prompts", limit=limit)
        yield prompt


@asynccontextmanager
async def uploaded(
    request: Request, media_type: str, options: str | None, metadata: str | None
) -> AsyncIterator[PromptUpload]:
    """Receive the prompt file of a request, with what comes beside it; what is large lies on disk.

    Args:
        request: its body is the file, or a form with the file.
        media_type: of the body.
        options: as the query has them, in JSON; those of a form win.
        metadata: likewise.

    Raises:
        Problem: the body is none of that, or there is no room for it.
    """
    coding = content_coding(request.headers.get("content-encoding"))
    if media_type == "multipart/form-data":
        if coding is not None:
            raise _compressed_form(coding)
        with _told_if_full():
            # Two of a kind are told apart from one that is unknown.
            form = await request.form(max_files=2, max_fields=4)
        try:
            yield _from_form(form, options, metadata)
        finally:
            await form.close()
    else:
        kind, beside = _known_kind(None, media_type), (_options(options), _metadata(metadata))
        with _spool() as file:
            with _told_if_full():
                async for piece in request.stream():
                    await run_in_threadpool(file.write, piece)
                await run_in_threadpool(file.seek, 0)
            yield PromptUpload(file, kind, coding, *beside, field="body")


def _from_form(form: FormData, options: str | None, metadata: str | None) -> PromptUpload:
    names = [name for name, _ in form.multi_items()]
    if unknown := sorted(set(names) - set(_FORM_FIELDS)):
        raise invalid("body", unknown[0], "a multipart upload has the fields 'file', 'options' and 'metadata' only")
    if twice := [name for name in _FORM_FIELDS if names.count(name) > 1]:
        detail = f"{twice[0]}: a multipart upload has one '{twice[0]}'; got {names.count(twice[0])}"
        raise Problem("invalid-request", detail, field=twice[0], limit=1)
    upload = form.get("file")
    if not isinstance(upload, UploadFile):
        raise Problem("invalid-request", "file: a multipart upload needs a file named 'file'", field="file")
    coding, filename = file_coding(upload.filename, upload.content_type)
    kind = _known_kind(filename, upload.content_type, shown=upload.filename)
    beside = _options(_text(form, "options", options)), _metadata(_text(form, "metadata", metadata))
    return PromptUpload(upload.file, kind, coding, *beside, field="file")


def _text(form: FormData, name: str, otherwise: str | None) -> str | None:
    value = form.get(name, otherwise)
    if isinstance(value, UploadFile):
        raise invalid(name, value.filename, "must be text")
    return value


def _options(text: str | None) -> JobOptions:
    return _beside("options", text, _OPTIONS) if text else JobOptions()


def _metadata(text: str | None) -> dict[str, str]:
    return _beside("metadata", text, _METADATA) if text else {}


def _beside(name: str, text: str, kind: TypeAdapter[Any]) -> Any:  # noqa: ANN401 - what `kind` says
    """Return what comes as JSON text beside a prompt file."""
    try:
        return kind.validate_python(load_text(text, name))
    except ValidationError as exc:
        raise invalid_all([{**error, "loc": (name, *error["loc"])} for error in exc.errors()]) from exc


@contextmanager
def _spool() -> Iterator[IO[bytes]]:
    """Make a file that is in memory while it is small."""
    file = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # noqa: SIM115 - closing may fail, see below
    try:
        yield file
    finally:
        with suppress(OSError):  # on a full disk, what could not be written is tried once more
            file.close()


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
        raise Problem("temporary-folder-full", detail, field="file") from exc


def _too_many() -> Problem:
    detail = (
        f"prompts: a JSON body has at most {MAX_JSON_PROMPTS} prompts; "
        "a file, such as .jsonl with one on each line, has any number: in the body, or as a multipart upload"
    )
    return Problem("invalid-request", detail, field="prompts", limit=MAX_JSON_PROMPTS, see="/jobs")


def _compressed_form(coding: Coding) -> Problem:
    detail = (
        f"Content-Encoding: a multipart body is not compressed as a whole, got {coding}; "
        "compress the file, and name it as prompts.jsonl.gz or prompts.jsonl.zst"
    )
    headers = {"Accept-Encoding": "identity"}
    return Problem("unsupported-media-type", detail, headers=headers, field="Content-Encoding")


def _known_kind(filename: str | None, media_type: str | None, shown: str | None = None) -> PromptFile:
    """Return the kind of a prompt file; errors call it `shown`."""
    kind = recognise(filename, media_type)
    if kind is None:
        what = shown or media_type or "a body without Content-Type"
        detail = (
            f"{what}: neither application/json nor a prompt file: .txt (text/plain), .jsonl (application/jsonl), "
            ".csv (text/csv) or .parquet (application/vnd.apache.parquet); in a form, .gz or .zst may follow"
        )
        raise Problem("unsupported-media-type", detail, field="file" if shown else "Content-Type")
    return kind
