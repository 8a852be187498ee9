"""/jobs: long prompt lists, whose results are fetched later as Parquet."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool

from api.jobrequest import parse_request, uploaded
from api.media_types import essence
from api.problems import invalid
from api.services import Services, ServicesDep
from api.stored import stored_response
from api.uploads import as_prompt, read_prompts
from jobs import keys
from jobs.chunking import ChunkLimits
from jobs.errors import JobNotFoundError, RecordFormatError
from jobs.messages import JobEvent
from jobs.progress import NOTHING_LIVE, Live
from jobs.records import JobOptions, JobRecord, JobView, Manifest, Prompt

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/jobs", tags=["jobs"])

PARQUET = "application/vnd.apache.parquet"


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
        body = await run_in_threadpool(parse_request, await request.body())
        prompts = (as_prompt(entry, n, f"prompts.{n}", max_chars) for n, entry in enumerate(body.prompts))
        record = await run_in_threadpool(store, prompts, body.options, body.metadata)
    else:
        async with uploaded(request, media_type, options) as (file, kind, chosen):
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
    shown = ids[:limit]
    views = []
    for job_id, live in zip(shown, await _live(services, shown), strict=True):
        try:
            views.append((await run_in_threadpool(services.store.files, job_id)).view(live))
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
    [live] = await _live(services, [job_id])
    return (await run_in_threadpool(services.store.files, job_id)).view(live)


async def _live(services: Services, job_ids: Sequence[str]) -> list[Live]:
    """Ask the broker once how far jobs have got; one that hangs costs its timeout once, not for each job."""
    try:
        async with services.redis.pipeline(transaction=False) as asked:
            for job_id in job_ids:
                asked.hgetall(keys.progress(job_id))
                asked.get(keys.trouble(job_id))
            answers = await asked.execute()
    except RedisError:  # progress is a courtesy: the files tell the rest
        return [NOTHING_LIVE] * len(job_ids)
    return [
        Live({int(chunk): int(rows) for chunk, rows in found.items()}, trouble.decode() if trouble else None)
        for found, trouble in zip(answers[::2], answers[1::2], strict=True)
    ]


async def _tell(services: Services, job_id: str) -> None:
    """Tell the reconciler that a job has changed; without that, it sees so when it next looks at the files."""
    with suppress(RedisError):
        await services.redis.rpush(keys.EVENTS, JobEvent(job_id=job_id).model_dump_json())
        await services.redis.expire(keys.EVENTS, keys.EVENTS_TTL_S)
