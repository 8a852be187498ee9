"""When a child process of the local stack that died is started again; knows no processes and no clock."""

from __future__ import annotations

import signal

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0
LONG_LIFE_S = 60.0  # who lived this long is not the one that cannot live: its next wait is the first again
_CANNOT_START = 1  # the exit code of our processes, and of a broker, for a bad setting and the like


class Restarts:
    """The starts and deaths of one child. Times are seconds of any clock that never goes back.

    Only deaths are known: a child that hangs is not started again.
    """

    def __init__(self) -> None:
        self._wait_s = FIRST_WAIT_S
        self._started = 0.0
        self._due = 0.0

    def is_due(self, now: float) -> bool:
        """Whether the child, which does not run, is to be started now."""
        return now >= self._due

    def started(self, now: float) -> None:
        """Note that the child was started, or that this was tried."""
        self._started = now

    def died(self, exit_code: int, now: float, *, was_ready: bool) -> float | None:
        """Note that the child ended without being asked to.

        Args:
            exit_code: negative for the signal that killed it, as `subprocess` has it.
            now: when it ended.
            was_ready: whether the stack has ever been ready.

        Returns:
            Seconds until it is due again, or None if it is not to be started again: it says that it cannot start, in a
            stack that has not shown that it can.
        """
        if exit_code == _CANNOT_START and not was_ready:
            return None
        if now - self._started >= LONG_LIFE_S:
            self._wait_s = FIRST_WAIT_S
        wait_s = self._wait_s
        self._wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        self._due = now + wait_s
        return wait_s


def describe_end(exit_code: int) -> str:
    """Return how a process ended, as the end of a sentence about it."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:  # most real-time signals have no name
        return f"was killed by signal {-exit_code}"
