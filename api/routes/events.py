"""GET /jobs/{id}/events: what happens to a job, as server-sent events."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Header, Response
from sse_starlette import EventSourceResponse

from api import openapi
from api.events import Seen, job_events
from api.jobviews import look_at
from api.ownjobs import OwnJobId
from api.services import ServicesDep

router = APIRouter(prefix="/jobs", tags=["jobs"])

# Streams have this long to end by themselves when the server stops; less than the server's own grace.
_FAREWELL_S = 1.0
# Tools take the schema of a stream for that of each event.
_EVENT = {
    "type": "object",
    "properties": {
        "event": {"type": "string", "enum": ["progress", "part", "end", "deleted"]},
        "id": {"type": "string", "description": "give it as Last-Event-ID to go on behind this event"},
        "data": {"type": "string", "description": "JSON: a part, or else the job without its parts"},
    },
}
_DOCS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events: `progress`, `part`, `end`, `deleted`",
        "content": {"text/event-stream": {"schema": _EVENT}},
    },
    204: {"description": "There is nothing after the event `Last-Event-ID`"},
    **openapi.answers("job-not-found", "invalid-request", "job-damaged"),
}


@router.get("/{job_id}/events", response_class=Response, response_model=None, responses=_DOCS)
async def events(
    job_id: OwnJobId,
    services: ServicesDep,
    last_event_id: Annotated[str | None, Header(description="the id of the last event that was received")] = None,
) -> Response:
    """Stream what happens to a job, until it is over."""
    seen = Seen.parse(last_event_id)
    look = partial(look_at, services, job_id, parts_limit=0)
    first = await look()
    if seen.covers(first):
        return Response(status_code=204)
    stopping = anyio.Event()
    return EventSourceResponse(
        job_events(look, first, seen, stopping), shutdown_event=stopping, shutdown_grace_period=_FAREWELL_S
    )
