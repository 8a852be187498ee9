"""What came of a job: its parts, its manifest, and all of its parts as one file."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from api import openapi
from api.accept import best_coding, best_media_type, header_of
from api.body import Body, respond
from api.merged import merged_parts
from api.ownjobs import OwnJobId
from api.problems import Problem, shorten
from api.readstream import ReadStream
from api.services import Services, ServicesDep
from api.stored import StoredContent, check_match, is_known, stored_response
from jobs.records import JobRecord, Manifest
from jobs.store import JobStore

router = APIRouter(prefix="/jobs", tags=["jobs"])

MODELS = (Manifest,)
"""What the descriptions below refer to."""
JSON = "application/json"
PARQUET = "application/vnd.apache.parquet"
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_PART_DOCS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The part", "content": {PARQUET: _BINARY}},
    206: {"description": "The range of it that was asked for", "content": {PARQUET: _BINARY}},
    304: {"description": "It is the one of `If-None-Match`"},
    307: {"description": "It is at `Location`, in the object store"},
    **openapi.answers(
        *("job-not-found", "part-not-found", "not-there-yet", "results-expired"),
        *("precondition-failed", "range-not-satisfiable", "job-damaged"),
    ),
}
_RESULTS_DOCS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The manifest, or all parts as one Parquet file",
        "content": {JSON: {"schema": openapi.reference(Manifest)}, PARQUET: _BINARY},
    },
    304: {"description": "The manifest is the one of `If-None-Match`"},
    **openapi.answers(
        *("job-not-found", "not-there-yet", "results-expired", "not-acceptable", "precondition-failed", "job-damaged")
    ),
}


@router.get("/{job_id}/parts/{index}", response_class=Response, response_model=None, responses=_PART_DOCS)
@router.head("/{job_id}/parts/{index}", include_in_schema=False)
async def part(
    job_id: OwnJobId, index: Annotated[int, Path(description="which part")], request: Request, services: ServicesDep
) -> Response:
    """Download a part as Parquet, or a `Range` of it."""
    content = await run_in_threadpool(_part, services.store, job_id, index)
    signed_url = await _signed_url(request, services, content)
    if signed_url is not None and not is_known(request, content.etag):
        return Response(status_code=307, headers={"Location": signed_url, "Cache-Control": "no-store"})
    return await stored_response(request, content)


def _part(store: JobStore, job_id: str, index: int) -> StoredContent:
    name = store.part_name(job_id, index)
    summary = store.report(job_id, index).part
    filename = f"{job_id}-{name.rpartition('/')[2]}"
    return StoredContent(store.storage, name, summary.bytes, summary.sha256, PARQUET, filename)


async def _signed_url(request: Request, services: Services, content: StoredContent) -> str | None:
    """Return where the client may fetch the content itself.

    The store knows nothing of our ETags, so it is not asked on a condition that would end well here.
    """
    seconds = services.settings.presigned_url_s
    if not seconds or request.method != "GET" or {"if-match", "if-range"} & set(request.headers):
        return None
    return await run_in_threadpool(services.store.storage.signed_url, content.name, seconds)


@router.get("/{job_id}/results", response_class=Response, response_model=None, responses=_RESULTS_DOCS)
@router.head("/{job_id}/results", include_in_schema=False)
async def results(
    job_id: OwnJobId,
    request: Request,
    services: ServicesDep,
    format: Annotated[  # noqa: A002 - the name of the parameter
        Literal["json", "parquet"] | None, Query(description="goes before `Accept`")
    ] = None,
) -> Response:
    """Return the manifest, which has every part with its rows, bytes and SHA-256; or all parts as one Parquet file."""
    media_type = _negotiated(request) if format is None else {"json": JSON, "parquet": PARQUET}[format]
    if media_type == PARQUET:
        return await _all_parts(request, services, job_id)
    content, etag = await run_in_threadpool(_manifest, services.store, job_id)
    headers = {"ETag": etag, "Vary": "Accept, Accept-Encoding"}
    check_match(request, etag)
    if is_known(request, etag):
        return Response(status_code=304, headers=headers)
    coding = best_coding(header_of(request.headers, "accept-encoding"), worthwhile=True)
    return respond(Body.of(content, JSON), headers, coding)


def _negotiated(request: Request) -> str:
    accept = header_of(request.headers, "accept")
    media_type = best_media_type(accept, [JSON, PARQUET])
    if media_type is None:
        shown = shorten(accept)
        detail = f"Accept: available are {JSON} and {PARQUET}; got {shown}"
        raise Problem("not-acceptable", detail, field="Accept", value=shown)
    return media_type


def _manifest(store: JobStore, job_id: str) -> tuple[bytes, str]:
    """Return the manifest as JSON, and its ETag: a weak one, since it is the same for each content coding."""
    content = store.manifest(job_id).model_dump_json().encode()
    return content, f'W/"{hashlib.sha256(content).hexdigest()}"'


def _finished(store: JobStore, job_id: str) -> JobRecord:
    store.manifest(job_id)  # tells what is missing if it is not there
    return store.load(job_id)


async def _all_parts(request: Request, services: Services, job_id: str) -> Response:
    record = await run_in_threadpool(_finished, services.store, job_id)
    headers = {
        "Accept-Ranges": "none",
        "Content-Disposition": f'attachment; filename="{job_id}.parquet"',
        "Vary": "Accept",
    }
    if request.method == "HEAD":
        return Response(None, 200, headers, PARQUET)
    pieces = merged_parts(services.store.storage, record)
    first = await run_in_threadpool(next, pieces)  # what is wrong with the first part is told before the headers
    return ReadStream(first, pieces, 200, headers, PARQUET)
