"""What happens to a job, as its server tells it while it happens."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal

import anyio
import httpx
from httpx_sse import EventSource, ServerSentEvent
from pydantic import Field

from jobs.records import JobStatus, JobView, PartView
from layerstack.address import job_path
from layerstack.errors import JobEndedError, ServerError, ServerUnreachableError, UnexpectedAnswerError
from layerstack.transport import Transport, patient_wait_s, record

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
    seen, is_known, failures = "", False, 0
    last_word = anyio.current_time()
    while True:
        try:
            headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": seen} if seen else {})
            async with transport.stream(f"{job_path(job_id)}/events", headers, read_s=_SILENCE_S) as response:
                if response.status_code == httpx.codes.NO_CONTENT:
                    return
                is_known = True
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    raise UnexpectedAnswerError(f"{transport.url} answers what no layerstack server does: no events")
                async for message in EventSource(response).aiter_sse():
                    last_word, failures = anyio.current_time(), 0
                    seen = message.id or seen
                    if (event := _parsed(message, transport.url)) is not None:
                        yield event
                        if event.kind in {"end", "deleted"}:
                            return
            wait_s = _WAIT_S
        except (ServerUnreachableError, ServerError) as exc:
            is_busy = isinstance(exc, ServerError) and exc.is_temporary
            is_lost = isinstance(exc, ServerUnreachableError) and is_known
            if not (is_busy or is_lost) or anyio.current_time() - last_word > patience_s:
                raise
            failures += 1
            wait_s = patient_wait_s(exc, failures)
            transport.on_retry(exc, wait_s)
        await anyio.sleep(wait_s)


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


def _parsed(message: ServerSentEvent, url: str) -> JobEvent | None:
    """Return an event, or None for a kind that this version does not know."""
    match message.event:
        case "progress" | "end" as kind:
            return JobEvent(kind, job=record(_EventJob, message.data, url))
        case "part":
            return JobEvent("part", part=record(PartView, message.data, url))
        case "deleted":
            return JobEvent("deleted")
        case _:
            return None


class _EventJob(JobView):
    """A job as events show it, without parts."""

    parts: list[PartView] = Field(default_factory=list)
    parts_next: int | None = None
