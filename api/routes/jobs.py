"""/jobs: long prompt lists, whose results are fetched later as Parquet."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from tempfile import SpooledTemporaryFile
from typing import IO, Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from kombu.exceptions import OperationalError
from pydantic import BaseModel, Field, StringConstraints, ValidationError
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from api.media_types import essence
from api.problems import Problem, invalid, invalid_all
from api.services import Services, ServicesDep
from api.uploads import Entry, PromptFile, as_prompt, read_prompts, recognise
from jobs import keys
from jobs.errors import JobNotFoundError
from jobs.messages import ChunkMessage
from jobs.queue import publish_chunks
from jobs.records import JobOptions, JobRecord, JobView, Manifest, Prompt, StrictRecord

router = APIRouter(prefix="/jobs", tags=["jobs"])

PARQUET = "application/vnd.apache.parquet"
_SPOOL_BYTES = 2**20
_ShortText = Annotated[str, StringConstraints(max_length=512)]


class JobRequest(StrictRecord):
    """The JSON body of POST /jobs."""

    prompts: list[Entry] = Field(examples=[["a fox in the snow", {"id": "7", "prompt": "a red barn"}]])
    options: JobOptions = JobOptions()
    metadata: dict[_ShortText, _ShortText] = Field(default={}, max_length=16)


class JobPage(BaseModel):
    """A page of jobs, newest first."""

    jobs: list[JobView]
    next: str | None = Field(description="give it as `after` for the next page; null on the last")


_CREATE_DOCS: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/JobRequest"}},
            "text/plain": {"schema": {"type": "string", "description": "one prompt a line"}},
            "application/jsonl": {"schema": {"type": "string", "description": "one string or {id, prompt} a line"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": ".txt or .jsonl"},
                        "options": {"type": "string", "description": "JSON, as in the JSON body"},
                    },
                }
            },
        },
    }
}


@router.post("", status_code=202, response_model=JobView, openapi_extra=_CREATE_DOCS)
async def create(
    request: Request,
    response: Response,
    services: ServicesDep,
    options: Annotated[str | None, Query(description="JSON; for bodies that are a prompt file")] = None,
) -> JobView:
    """Store a job and queue it. The prompts come as JSON, as a file in the body, or as a multipart upload."""
    encoder = await services.encoders.current()
    media_type = essence(request.headers.get("content-type"))
    max_chars = services.settings.prompt_max_chars

    def store(prompts: Iterator[Prompt], chosen: JobOptions, metadata: dict[str, str]) -> JobRecord:
        record = services.store.create(
            prompts,
            options=chosen,
            encoder=encoder,
            default_chunk_rows=services.settings.chunk_rows,
            metadata=metadata,
        )
        _enqueue(services, record)
        return record

    if media_type == "application/json":
        if options is not None:
            raise invalid("options", options, "a JSON body has its own 'options'")
        body = await run_in_threadpool(_parse_request, await request.body())
        prompts = (as_prompt(entry, n, f"prompts.{n}", max_chars) for n, entry in enumerate(body.prompts))
        record = await run_in_threadpool(store, prompts, body.options, body.metadata)
    else:
        async with _uploaded(request, media_type, options) as (file, kind, chosen):
            record = await run_in_threadpool(store, read_prompts(file, kind, max_chars), chosen, {})
    response.headers["Location"] = f"/jobs/{record.id}"
    return await run_in_threadpool(services.store.view, record.id)


@router.get("")
async def list_jobs(
    services: ServicesDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(description="`next` of the page before")] = None,
) -> JobPage:
    """List jobs, newest first."""
    ids = await run_in_threadpool(services.store.list_ids, limit=limit + 1, after=after)
    views = []
    for job_id in ids[:limit]:
        with suppress(JobNotFoundError):  # deleted since it was listed
            views.append(await _view(services, job_id))
    return JobPage(jobs=views, next=ids[limit - 1] if len(ids) > limit else None)


@router.get("/{job_id}")
async def show(job_id: str, services: ServicesDep) -> JobView:
    """Tell how far a job got, and which parts are done."""
    return await _view(services, job_id)


@router.get("/{job_id}/parts/{index}", response_class=FileResponse, responses={200: {"content": {PARQUET: {}}}})
async def part(job_id: str, index: int, services: ServicesDep) -> FileResponse:
    """Download a part as Parquet, or a `Range` of it."""
    path = await run_in_threadpool(services.store.part_path, job_id, index)
    return FileResponse(path, media_type=PARQUET, filename=f"{job_id}-{path.name}")


@router.get("/{job_id}/results")
async def results(job_id: str, services: ServicesDep) -> Manifest:
    """Return the manifest: every part with its rows, bytes and SHA-256."""
    return await run_in_threadpool(services.store.manifest, job_id)


async def _view(services: Services, job_id: str) -> JobView:
    progress: dict[int, int] = {}
    with suppress(RedisError):  # progress is a courtesy: the files tell the rest
        found = await services.redis.hgetall(keys.progress(job_id))
        progress = {int(chunk): int(rows) for chunk, rows in found.items()}
    return await run_in_threadpool(services.store.view, job_id, progress)


def _enqueue(services: Services, record: JobRecord) -> None:
    """Queue every chunk; a job that cannot be queued is taken back, since its client is told that it failed."""
    try:
        publish_chunks(
            services.celery, (ChunkMessage(job_id=record.id, chunk=chunk) for chunk in range(record.num_chunks))
        )
    except OperationalError:
        services.store.remove(record.id)
        raise


def _parse_request(content: bytes) -> JobRequest:
    try:
        return JobRequest.model_validate_json(content)
    except ValidationError as exc:
        raise invalid_all(exc.errors()) from exc


def _parse_options(text: str | None) -> JobOptions:
    try:
        return JobOptions.model_validate_json(text) if text else JobOptions()
    except ValidationError as exc:
        raise invalid_all([{**error, "loc": ("options", *error["loc"])} for error in exc.errors()]) from exc


@asynccontextmanager
async def _uploaded(
    request: Request, media_type: str, options: str | None
) -> AsyncIterator[tuple[IO[bytes], PromptFile, JobOptions]]:
    """Open the prompt file of a request; what is large lies on disk."""
    if media_type == "multipart/form-data":
        async with request.form(max_files=2, max_fields=2) as form:
            upload = form.get("file")
            if not isinstance(upload, UploadFile):
                raise Problem(
                    422, "invalid-request", "file: a multipart upload needs a file named 'file'", field="file"
                )
            if unknown := sorted(set(form) - {"file", "options"}):
                raise invalid("body", unknown[0], "a multipart upload has the fields 'file' and 'options' only")
            chosen = form.get("options", options)
            if not isinstance(chosen, str | None):
                raise invalid("options", chosen.filename, "must be text")
            yield upload.file, _known_kind(upload.filename, upload.content_type), _parse_options(chosen)
    else:
        kind, chosen_options = _known_kind(None, media_type), _parse_options(options)
        with SpooledTemporaryFile(max_size=_SPOOL_BYTES) as spool:
            async for piece in request.stream():
                await run_in_threadpool(spool.write, piece)
            spool.seek(0)
            yield spool, kind, chosen_options


def _known_kind(filename: str | None, media_type: str | None) -> PromptFile:
    kind = recognise(filename, media_type)
    if kind is None:
        what = filename or media_type or "a body without Content-Type"
        detail = f"{what}: neither application/json nor a prompt file: .txt (text/plain) or .jsonl (application/jsonl)"
        raise Problem(415, "unsupported-media-type", detail, field="file" if filename else "Content-Type")
    return kind
