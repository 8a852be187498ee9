"""/jobs: long prompt lists, whose results are fetched later as Parquet."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from tempfile import SpooledTemporaryFile
from typing import IO, Annotated, Any, cast

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field, StringConstraints, ValidationError
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from api.media_types import essence
from api.problems import Problem, invalid, invalid_all
from api.services import Services, ServicesDep
from api.stored import stored_response
from api.uploads import Entry, PromptFile, as_prompt, read_prompts, recognise
from jobs import keys
from jobs.chunking import ChunkLimits
from jobs.errors import JobNotFoundError, RecordFormatError
from jobs.messages import JobEvent
from jobs.progress import NOTHING_LIVE, Live
from jobs.records import JobOptions, JobRecord, JobView, Manifest, Prompt, StrictRecord

logger = logging.getLogger(__name__)
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
            "text/csv": {"schema": {"type": "string", "description": "a header with the column prompt, perhaps id"}},
            "application/vnd.apache.parquet": {
                "schema": {"type": "string", "format": "binary", "description": "the column prompt, perhaps id"}
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": ".txt, .jsonl, .csv, .parquet"},
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
    """Store a job, which then runs by itself. The prompts come as JSON, as a file, or as an upload."""
    encoder = await services.encoders.current()
    media_type = essence(request.headers.get("content-type"))
    max_chars = services.settings.prompt_max_chars

    def store(prompts: Iterator[Prompt], chosen: JobOptions, metadata: dict[str, str]) -> JobRecord:
        settings = services.settings
        return services.store.create(
            prompts,
            options=chosen,
            encoder=encoder,
            limits=ChunkLimits(settings.chunk_rows, settings.chunk_tokens),
            metadata=metadata,
            reserve_bytes=settings.storage_reserve_bytes,
        )

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
    await _tell(services, record.id)
    return await _view(services, record.id)


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
        try:
            views.append(await _view(services, job_id))
        except JobNotFoundError:
            continue  # deleted since it was listed
        except RecordFormatError as exc:
            logger.error("left out of the list: %s", exc)  # noqa: TRY400 - the message says it all
    return JobPage(jobs=views, next=ids[limit - 1] if len(ids) > limit else None)


@router.get("/{job_id}")
async def show(job_id: str, services: ServicesDep) -> JobView:
    """Tell how far a job got, and which parts are done."""
    return await _view(services, job_id)


@router.get("/{job_id}/parts/{index}", response_class=FileResponse, responses={200: {"content": {PARQUET: {}}}})
async def part(job_id: str, index: int, request: Request, services: ServicesDep) -> Response:
    """Download a part as Parquet, or a `Range` of it."""
    name = await run_in_threadpool(services.store.part_name, job_id, index)
    filename = f"{job_id}-{name.rpartition('/')[2]}"
    path = services.store.storage.local_path(name)
    if path is not None:
        return FileResponse(path, media_type=PARQUET, filename=filename)
    return await stored_response(services.store.storage, name, PARQUET, filename, request.headers.get("range"))


@router.get("/{job_id}/results")
async def results(job_id: str, services: ServicesDep) -> Manifest:
    """Return the manifest: every part with its rows, bytes and SHA-256."""
    return await run_in_threadpool(services.store.manifest, job_id)


@router.post("/{job_id}/cancel", status_code=202)
async def cancel(job_id: str, services: ServicesDep) -> JobView:
    """Stop a job between two batches. What is done stays; `retry` does the rest."""
    await run_in_threadpool(services.store.cancel, job_id)
    with suppress(RedisError):  # workers look at the mark in the storage as well, only later
        await services.redis.set(keys.cancelled(job_id), 1, ex=keys.CANCELLED_TTL_S)
    await _tell(services, job_id)
    return await _view(services, job_id)


@router.post("/{job_id}/retry", status_code=202)
async def retry(job_id: str, services: ServicesDep) -> JobView:
    """Do what is missing of a job that failed or was cancelled; check and repair one that succeeded."""
    await run_in_threadpool(services.store.retry, job_id)
    with suppress(RedisError):  # it expires; until then workers put the job's chunks down
        await services.redis.delete(keys.cancelled(job_id))
    await _tell(services, job_id)
    return await _view(services, job_id)


@router.delete("/{job_id}", status_code=204)
async def delete(job_id: str, services: ServicesDep) -> None:
    """Delete a job and its results, at once and for good."""
    await run_in_threadpool(services.store.delete, job_id)


async def _view(services: Services, job_id: str) -> JobView:
    live = NOTHING_LIVE
    with suppress(RedisError):  # progress is a courtesy: the files tell the rest
        found = await services.redis.hgetall(keys.progress(job_id))
        trouble = cast("bytes | None", await services.redis.get(keys.trouble(job_id)))
        rows = {int(chunk): int(rows) for chunk, rows in found.items()}
        live = Live(rows, trouble.decode() if trouble else None)
    files = await run_in_threadpool(services.store.files, job_id)
    return files.view(live)


async def _tell(services: Services, job_id: str) -> None:
    """Tell the reconciler that a job has changed; without that, it sees so when it next looks at the files."""
    with suppress(RedisError):
        await services.redis.rpush(keys.EVENTS, JobEvent(job_id=job_id).model_dump_json())
        await services.redis.expire(keys.EVENTS, keys.EVENTS_TTL_S)


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
        detail = (
            f"{what}: neither application/json nor a prompt file: .txt (text/plain), .jsonl (application/jsonl), "
            ".csv (text/csv) or .parquet (application/vnd.apache.parquet)"
        )
        raise Problem(415, "unsupported-media-type", detail, field="file" if filename else "Content-Type")
    return kind
