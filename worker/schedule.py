"""Which chunks of a job go to the queue, and when. Decisions only: no files, no Redis, no clock of its own.

A chunk is done, given up, outstanding (in the queue or with a worker), or waits. Few are outstanding at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_LONGEST_PAUSE_S = 60.0


@dataclass
class Schedule:
    """The chunks of one job. Times are seconds of any one clock.

    Attributes:
        num_chunks: of the job.
        stops_at_failure: whether nothing more is sent once a chunk is given up.
        outstanding: when each of them was sent to the queue.
    """

    num_chunks: int
    stops_at_failure: bool = False
    outstanding: dict[int, float] = field(default_factory=dict)
    _done: set[int] = field(default_factory=set)
    _given_up: set[int] = field(default_factory=set)
    _delayed: dict[int, float] = field(default_factory=dict)
    _cursor: int = 0  # no chunk below it waits, but for those in `_again`
    _again: set[int] = field(default_factory=set)
    _stalled_until: float = 0.0
    _stall_s: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether every chunk is done."""
        return len(self._done) == self.num_chunks

    @property
    def settled(self) -> bool:
        """Whether nothing more is to be done: every chunk is done or given up, or one that ends the job is given up."""
        return self._has_stopped or len(self._done) + len(self._given_up) == self.num_chunks

    @property
    def demand(self) -> int:
        """How many chunks could be outstanding at most."""
        if self._has_stopped:
            return 0
        return 1 if self._stall_s else self.num_chunks - len(self._done) - len(self._given_up)

    def learn(self, done: Iterable[int], given_up: Iterable[int]) -> None:
        """Take over what the files say. A chunk whose part has gone waits again."""
        before = self._done | self._given_up
        self._done = set()
        for chunk in done:
            self.done(chunk)
        self._given_up = set(given_up) - self._done
        self._again |= before - self._done - self._given_up

    def done(self, chunk: int) -> None:
        """Note that a chunk's part counts; so the storage works."""
        self._done.add(chunk)
        self._given_up.discard(chunk)
        self._again.discard(chunk)
        self._delayed.pop(chunk, None)
        if self.outstanding.pop(chunk, None) is not None:
            self._stall_s = self._stalled_until = 0.0

    def give_up(self, chunk: int) -> None:
        """Note that a chunk has used up its attempts."""
        self.outstanding.pop(chunk, None)
        if chunk not in self._done:
            self._given_up.add(chunk)

    def put_back(self, chunk: int, not_before: float = 0.0) -> None:
        """Note that a chunk is to be sent again."""
        self.outstanding.pop(chunk, None)
        self._done.discard(chunk)
        self._again.add(chunk)
        self._delayed[chunk] = not_before

    def stall(self, chunk: int, now: float) -> float | None:
        """Note that a chunk could not be done for want of its storage.

        Returns:
            Seconds until one chunk is tried; None if that is known, since the chunk was under way when it began.
        """
        self.put_back(chunk)
        if now < self._stalled_until:
            return None
        self._stall_s = min(_LONGEST_PAUSE_S, max(1.0, 2 * self._stall_s))
        self._stalled_until = now + self._stall_s
        return self._stall_s

    def due(self, now: float, window: int) -> list[int]:
        """Choose the chunks to send now, so that at most `window` are outstanding, and take them for sent."""
        if now < self._stalled_until or self._has_stopped:
            return []
        room = (1 if self._stall_s else window) - len(self.outstanding)
        chosen = sorted(chunk for chunk in self._again if self._may_go(chunk, now))[: max(0, room)]
        self._again.difference_update(chosen)
        self.outstanding |= dict.fromkeys(chosen, now)
        while len(chosen) < room and self._cursor < self.num_chunks:
            if self._may_go(self._cursor, now) and self._cursor not in self._again:
                chosen.append(self._cursor)
                self.outstanding[self._cursor] = now
            self._cursor += 1
        return chosen

    @property
    def _has_stopped(self) -> bool:
        return self.stops_at_failure and bool(self._given_up)

    def _may_go(self, chunk: int, now: float) -> bool:
        taken = chunk in self._done or chunk in self._given_up or chunk in self.outstanding
        return not taken and self._delayed.get(chunk, 0.0) <= now


def shares(demands: Sequence[int], total: int, *, least: int) -> list[int]:
    """Divide `total` evenly among jobs, what one does not need among the others; each may have `least`."""
    found, left = [0] * len(demands), total
    for rank, position in enumerate(sorted(range(len(demands)), key=demands.__getitem__)):
        found[position] = max(least, left // (len(demands) - rank))
        left = max(0, left - min(found[position], demands[position]))
    return found


def pause_s(failures: int) -> float:
    """Return how long a chunk waits after so many failures in a row: 1 s, 2 s, 4 s, up to a minute."""
    return min(_LONGEST_PAUSE_S, 2.0 ** min(30, max(0, failures - 1)))
