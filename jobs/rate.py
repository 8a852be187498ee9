"""How fast a job goes: from when its last parts were reported, and how many rows they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise

# A time without a part is a pause, which tells nothing of the rate, if it is longer than this and than so many times
# the others: the job waited for a worker or its storage, or was cancelled, and retried the next day.
_PAUSE = timedelta(minutes=10)
_PAUSE_FACTOR = 10


@dataclass(frozen=True)
class Reported:
    """A finished part: when its report was written, and its rows."""

    at: datetime
    rows: int


def recent_rate(parts: Sequence[Reported]) -> float | None:
    """Return prompts a second between the first and the last of `parts`, pauses left out.

    The rows of the first were encoded before its report was written, so they do not count. The order of `parts` is of
    no importance, and so neither is a clock that was put back: what lies before it now counts as earlier.

    Returns:
        None if there are fewer than two parts, or all of them have the same time.
    """
    ordered = sorted(parts, key=lambda part: part.at)
    steps = [(later.at - earlier.at, later.rows) for earlier, later in pairwise(ordered)]
    total = sum((gap for gap, _ in steps), timedelta())
    steady = [(gap, rows) for gap, rows in steps if not _is_pause(gap, total, len(steps))]
    return _per_second(steady) or _per_second(steps)


def overall_rate(num_done: int, elapsed: timedelta) -> float | None:
    """Return prompts a second since a job began; None if nothing is done, or no time has passed."""
    return _per_second([(elapsed, num_done)])


def _is_pause(gap: timedelta, total: timedelta, count: int) -> bool:
    return count > 1 and gap > _PAUSE and gap > _PAUSE_FACTOR * (total - gap) / (count - 1)


def _per_second(steps: Sequence[tuple[timedelta, int]]) -> float | None:
    seconds = sum(gap.total_seconds() for gap, _ in steps)
    rows = sum(rows for _, rows in steps)
    return rows / seconds if rows > 0 and seconds > 0 else None
