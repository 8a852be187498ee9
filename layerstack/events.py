"""What happens to a job, as its server tells it while it happens."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal

import anyio
import httpx
from httpx_sse import EventSource, ServerSentEvent

from jobs.records import JobStatus, JobView, PartView
from layerstack.errors import JobEndedError, ServerError, ServerUnreachableError
from layerstack.transport import Transport

# The server sends a comment every 15 s.
_SILENCE_S = 60.0
_WAIT_S = 1.0


@dataclass(frozen=True)
class JobEvent:
    """One event of a job.

    Attributes:
        kind: what happened.
        job: the job, without parts; of "progress" and "end".
        part: of "part", a finished part.
    """

    kind: Literal["progress", "part", "end", "deleted"]
    job: JobView | None = None
    part: PartView | None = None


async def job_events(transport: Transport, job_id: str, *, patience_s: float) -> AsyncGenerator[JobEvent]:
    """Yield the events of a job until its end, across lost connections and restarts of the server.

    Args:
        transport: to the server.
        job_id: which job.
        patience_s: seconds that the server may be away.

    Raises:
        ServerUnreachableError: it was away for longer, or nobody answered at all.
        ServerError: there is no such job, say.
    """
    seen, is_known = "", False
    last_word = anyio.current_time()
    while True:
        try:
            headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": seen} if seen else {})
            async with transport.stream(f"/jobs/{job_id}/events", headers, read_s=_SILENCE_S) as response:
                if response.status_code == httpx.codes.NO_CONTENT:
                    return
                is_known = True
                async for message in EventSource(response).aiter_sse():
                    last_word = anyio.current_time()
                    seen = message.id or seen
                    if (event := _parsed(message)) is not None:
                        yield event
                        if event.kind in {"end", "deleted"}:
                            return
        except (ServerUnreachableError, ServerError) as exc:
            is_final = isinstance(exc, ServerError) and not exc.is_temporary
            if is_final or not is_known or anyio.current_time() - last_word > patience_s:
                raise
        await anyio.sleep(_WAIT_S)


def ended_well(job_id: str, job: JobView | None) -> JobView:
    """Return a job that has ended, None for one that was deleted, if it has succeeded.

    Raises:
        JobEndedError: it has not.
    """
    if job is None:
        raise JobEndedError(f"job {job_id} has been deleted", None)
    if job.status is not JobStatus.SUCCEEDED:
        why = f": {job.error}" if job.error else ""
        raise JobEndedError(f"job {job_id} is {job.status}{why}", job)
    return job


def _parsed(message: ServerSentEvent) -> JobEvent | None:
    """Return an event, or None for a kind that this version does not know."""
    match message.event:
        case "progress" | "end" as kind:
            return JobEvent(kind, job=JobView.model_validate(_whole(message.json())))
        case "part":
            return JobEvent("part", part=PartView.model_validate(message.json()))
        case "deleted":
            return JobEvent("deleted")
        case _:
            return None


def _whole(job: dict[str, Any]) -> dict[str, Any]:
    """Add the parts that events leave out."""
    return {"parts": [], "parts_next": None} | job
