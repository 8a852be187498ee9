"""/jobs: long prompt lists, whose results are fetched later as Parquet."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from ulid import ULID

from api import openapi
from api.access import OwnerDep
from api.joblist import JobPage, list_page
from api.jobrequest import JobRequest, at_most, parse_request, uploaded
from api.jobviews import look_at
from api.live import tell_cancelled, tell_changed
from api.media_types import essence
from api.ownjobs import OwnJobId
from api.problems import Problem, invalid, shorten
from api.services import Services, ServicesDep
from api.uploads import as_prompt
from jobs.chunking import ChunkLimits
from jobs.records import EncoderInfo, JobOptions, JobRecord, JobStatus, JobView, Prompt

router = APIRouter(prefix="/jobs", tags=["jobs"])

MAX_KEY_CHARS = 255
# A large file takes minutes: of those that are read at the same time, none takes a thread from other requests.
_CREATIONS = CapacityLimiter(8)
_KEY = rf"[!-~]{{1,{MAX_KEY_CHARS}}}"
_TEXT = {"type": "string"}
_FILE_IN_FORM = ".txt, .jsonl, .csv or .parquet; .gz or .zst may follow"
_BODY = openapi.body(
    {
        "application/json": {"schema": openapi.reference(JobRequest)},
        "text/plain": {"schema": _TEXT | {"description": "one prompt a line"}},
        "application/jsonl": {"schema": _TEXT | {"description": "one string or {id, prompt} a line"}},
        "text/csv": {"schema": _TEXT | {"description": "a header with the column prompt, perhaps id"}},
        "application/vnd.apache.parquet": {
            "schema": _TEXT | {"format": "binary", "description": "the column prompt, perhaps id"}
        },
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {
                    "file": _TEXT | {"format": "binary", "description": _FILE_IN_FORM},
                    "options": _TEXT | {"description": "JSON, as in the JSON body"},
                    "metadata": _TEXT | {"description": "JSON, as in the JSON body"},
                },
            }
        },
    }
)
_CREATED: dict[int | str, dict[str, Any]] = {
    202: {
        "description": "The job",
        "headers": {
            "Location": {"description": "its path", "schema": _TEXT},
            "Idempotency-Replayed": {"description": "`true`: it was there already", "schema": _TEXT},
        },
    },
    **openapi.answers(
        *("body-too-large", "too-many-prompts", "unsupported-media-type", "invalid-request", "prompt-too-long"),
        *("http-error", "no-worker", "broker-unavailable"),
        *("not-enough-space", "temporary-folder-full", "storage-full", "job-damaged"),
    ),
}
_OF_A_JOB = openapi.answers("job-not-found", "job-damaged")
_CHANGED = openapi.answers("job-not-found", "job-state", "job-damaged", "storage-full")


@router.post("", status_code=202, response_model=JobView, responses=_CREATED, openapi_extra=_BODY)
async def create(
    request: Request,
    response: Response,
    services: ServicesDep,
    owner: OwnerDep,
    options: Annotated[str | None, Query(description="JSON; for bodies that are a prompt file")] = None,
    metadata: Annotated[str | None, Query(description="JSON; for bodies that are a prompt file")] = None,
    idempotency_key: Annotated[
        str | None,
        Header(
            description="a create that is repeated with the same key returns the job of the first",
            json_schema_extra={"minLength": 1, "maxLength": MAX_KEY_CHARS, "pattern": f"^{_KEY}$"},
        ),
    ] = None,
) -> JobView:
    """Store a job, which then runs by itself. The prompts come as JSON, as a file, or as an upload."""
    _check_key(idempotency_key)
    job_id, new_id = await _created_before(services, owner, idempotency_key), str(ULID())
    if job_id is None:
        creation = _Creation(services, await services.encoders.current(), owner, idempotency_key, new_id)
        record = await creation.run(request, {"options": options, "metadata": metadata})
        job_id = record.id
        if job_id == new_id:
            services.metrics.accepted(record.num_prompts)
    if job_id != new_id:  # that of an earlier create, or of one that was faster
        response.headers["Idempotency-Replayed"] = "true"
    # Also of an earlier create, whose server may have died before it told anybody.
    await tell_changed(services.redis, job_id)
    response.headers["Location"] = f"/jobs/{job_id}"
    return await _view(services, job_id)


async def _created_before(services: Services, owner: str | None, key: str | None) -> str | None:
    return None if key is None else await run_in_threadpool(services.store.created_before, owner, key)


def _check_key(key: str | None) -> None:
    if key is None or re.fullmatch(_KEY, key):
        return
    shown = shorten(key)
    detail = f"Idempotency-Key: a key has 1 to {MAX_KEY_CHARS} visible ASCII characters; got {len(key)}: {shown}"
    raise Problem("invalid-request", detail, field="Idempotency-Key", value=shown, limit=MAX_KEY_CHARS)


class _Creation:
    """A job that is to be stored."""

    def __init__(
        self, services: Services, encoder: EncoderInfo, owner: str | None, key: str | None, job_id: str
    ) -> None:
        self._store, self._settings = services.store, services.settings
        self._encoder, self._owner, self._key, self._job_id = encoder, owner, key, job_id

    async def run(self, request: Request, query: Mapping[str, str | None]) -> JobRecord:
        """Read the body and store the job; `query` has what comes beside a prompt file."""
        settings, media_type = self._settings, essence(request.headers.get("content-type"))
        if media_type != "application/json":
            async with uploaded(request, media_type, query["options"], query["metadata"]) as upload:
                prompts = upload.prompts(settings)
                return await self._store_it(prompts, upload.options, upload.metadata)
        for name, given in query.items():
            if given is not None:
                raise invalid(name, given, f"a JSON body has its own '{name}'")
        body = await run_in_threadpool(
            parse_request,
            await request.body(),
            content_encoding=request.headers.get("content-encoding"),
            max_bytes=settings.body_max_bytes,
        )
        prompts = (
            as_prompt(entry, n, f"prompts.{n}", settings.prompt_max_chars) for n, entry in enumerate(body.prompts)
        )
        return await self._store_it(prompts, body.options, body.metadata)

    async def _store_it(self, *job: Any) -> JobRecord:  # noqa: ANN401 - what `_stored` takes
        return await to_thread.run_sync(self._stored, *job, limiter=_CREATIONS)

    def _stored(self, prompts: Iterator[Prompt], options: JobOptions, metadata: Mapping[str, str]) -> JobRecord:
        settings = self._settings
        return self._store.create(
            at_most(prompts, settings.job_max_prompts),
            options=options,
            encoder=self._encoder,
            limits=ChunkLimits(settings.chunk_rows, settings.chunk_tokens),
            metadata=metadata,
            reserve_bytes=settings.storage_reserve_bytes,
            owner=self._owner,
            idempotency_key=self._key,
            job_id=self._job_id,
        )


@router.get("")
async def list_jobs(
    services: ServicesDep,
    owner: OwnerDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(description="`next` of the page before")] = None,
    status: Annotated[list[JobStatus] | None, Query(description="jobs in this state; of several, in any")] = None,
) -> JobPage:
    """List jobs, newest first."""
    return await list_page(services, owner=owner, after=after, limit=limit, states=status or ())


@router.get("/{job_id}", responses=_OF_A_JOB)
async def show(
    job_id: OwnJobId,
    services: ServicesDep,
    parts_after: Annotated[int | None, Query(description="`parts_next` of the answer before")] = None,
    parts_limit: Annotated[int, Query(ge=0, le=1000, description="how many parts to list at most")] = 100,
) -> JobView:
    """Tell how far a job got, and which parts are done."""
    return (await look_at(services, job_id, parts_after=parts_after, parts_limit=parts_limit)).view


@router.post("/{job_id}/cancel", status_code=202, responses=_CHANGED)
async def cancel(job_id: OwnJobId, services: ServicesDep) -> JobView:
    """Stop a job between two batches. What is done stays; `retry` does the rest."""
    await run_in_threadpool(services.store.cancel, job_id)
    await tell_cancelled(services.redis, job_id, cancelled=True)
    await tell_changed(services.redis, job_id)
    return await _view(services, job_id)


@router.post("/{job_id}/retry", status_code=202, responses=_CHANGED)
async def retry(job_id: OwnJobId, services: ServicesDep) -> JobView:
    """Do what is missing of a job that failed or was cancelled; check and repair one that succeeded."""
    await run_in_threadpool(services.store.retry, job_id)
    await tell_cancelled(services.redis, job_id, cancelled=False)
    await tell_changed(services.redis, job_id)
    return await _view(services, job_id)


@router.delete("/{job_id}", status_code=204, responses=openapi.answers("job-not-found"))
async def delete(job_id: OwnJobId, services: ServicesDep) -> None:
    """Delete a job and its results, at once and for good."""
    await run_in_threadpool(services.store.delete, job_id)


async def _view(services: Services, job_id: str) -> JobView:
    return (await look_at(services, job_id)).view
