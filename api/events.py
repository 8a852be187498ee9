"""The events of a job, as they are streamed, and what a client has seen of them. Nothing of that is kept here.

The id of an event says what its reader has seen: the parts, as ranges of their numbers, and the last status, as in
`0-119,123;running`. Parts are finished nearly in order, so it stays short.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from time import monotonic

import anyio
from sse_starlette import ServerSentEvent

from api.jobviews import Look
from api.problems import invalid
from jobs.errors import JobNotFoundError, StorageError
from jobs.records import JobStatus, JobView, PartView

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 1.0
# A look at a large job may take long: at most a tenth of the time goes into it.
_REST_PER_LOOK = 10
# So that ids stay short; parts that come out of order wait until gaps have closed, or the job is over.
_MAX_RANGES = 200
_RANGE = r"\d{1,9}(?:-\d{1,9})?"
_ID = re.compile(rf"((?:{_RANGE}(?:,{_RANGE})*)?);([a-z]*)", re.ASCII)


class Seen:
    """Which parts a client has been told of, and the status last."""

    def __init__(self, ranges: list[tuple[int, int]] | None = None, status: JobStatus | None = None) -> None:
        self._ranges = ranges or []
        self.status = status

    @classmethod
    def parse(cls, header: str | None) -> Seen:
        """Return what a client has seen, by its `Last-Event-ID`.

        Raises:
            Problem: 422, it is no id of ours.
        """
        if not header:
            return cls()
        found = _ID.fullmatch(header)
        ranges = _parse_ranges(found[1]) if found else None
        status = found[2] if found else ""
        if ranges is None or status not in {"", *JobStatus}:
            raise invalid("Last-Event-ID", header, "must be the id of an event of a job, such as '0-119,123;running'")
        return cls(ranges, JobStatus(status) if status else None)

    def __str__(self) -> str:
        ranges = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in self._ranges)
        return f"{ranges};{self.status or ''}"

    def __contains__(self, part: int) -> bool:
        place = bisect_right(self._ranges, (part + 1,)) - 1
        return place >= 0 and part <= self._ranges[place][1]

    def fits(self, part: int) -> bool:
        """Whether the id stays short with one more part in it."""
        return len(self._ranges) < _MAX_RANGES or part - 1 in self or part + 1 in self

    def add(self, part: int) -> None:
        """Take a part for seen that was not."""
        place = bisect_right(self._ranges, (part,))
        first = last = part
        if place < len(self._ranges) and self._ranges[place][0] == part + 1:
            last = self._ranges.pop(place)[1]
        if place > 0 and self._ranges[place - 1][1] == part - 1:
            place -= 1
            first = self._ranges.pop(place)[0]
        self._ranges.insert(place, (first, last))

    def covers(self, look: Look) -> bool:
        """Whether there is nothing more to tell."""
        return look.is_over and self.status == look.view.status and not _unseen(look, self)


def _parse_ranges(text: str) -> list[tuple[int, int]] | None:
    """Return ranges as we write them: in order, and with gaps between them. Others are None."""
    ranges: list[tuple[int, int]] = []
    for each in filter(None, text.split(",")):
        first, _, last = each.partition("-")
        ranges.append((int(first), int(last or first)))
    in_order = all(first <= last for first, last in ranges)
    return ranges if in_order and all(before[1] + 1 < after[0] for before, after in pairwise(ranges)) else None


async def job_events(
    look: Callable[[], Awaitable[Look]], first: Look, seen: Seen, stopping: anyio.Event
) -> AsyncIterator[ServerSentEvent]:
    """Yield the events of a job until it is over or deleted, or the server stops.

    Args:
        look: looks at the job, without its parts.
        first: what it saw at first.
        seen: what the client has seen; what is yielded is added to it.
        stopping: set when the server stops.
    """
    current: Look | None = first
    shown: JobView | None = None
    pause_s = _SECONDS_BETWEEN_LOOKS
    while not stopping.is_set():
        if current is not None:
            if not current.is_over and current.view != shown:
                shown, seen.status = current.view, current.view.status
                yield _event("progress", current.view, seen)
            for part in _unseen(current, seen):
                if current.is_over or seen.fits(part):
                    seen.add(part)
                    yield _event("part", current.files.part_view(part), seen)
            if current.is_over:
                seen.status = current.view.status
                yield _event("end", current.view, seen)
                return
        with anyio.move_on_after(pause_s):
            await stopping.wait()
            return
        begun = monotonic()
        try:
            current = await look()
        except JobNotFoundError:
            yield ServerSentEvent(event="deleted", data=f'{{"id":"{first.view.id}"}}')
            return
        except StorageError as exc:
            logger.warning("the events of job %s wait for the storage: %s", first.view.id, exc)
            current = None
        pause_s = max(_SECONDS_BETWEEN_LOOKS, _REST_PER_LOOK * (monotonic() - begun))


def _unseen(look: Look, seen: Seen) -> list[int]:
    """Return the parts that there are and the client does not know of, in order."""
    if look.view.status is JobStatus.EXPIRED:
        return []
    return sorted(part for part in look.files.parts if part not in seen)


def _event(name: str, content: JobView | PartView, seen: Seen) -> ServerSentEvent:
    return ServerSentEvent(event=name, id=str(seen), data=content.model_dump_json())
