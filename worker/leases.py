"""Leases in Redis: who works on what, for as long as it gives signs of life. They save work; they decide nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from redis import Redis, RedisError
from redis.exceptions import LockError
from redis.lock import Lock

logger = logging.getLogger(__name__)
# Renewals within the time that a lease lasts: some may fail.
_RENEWALS = 4


class Lease:
    """One lease.

    Attributes:
        lost: whether somebody else has it, since this process slept for too long.
    """

    def __init__(self, lock: Lock) -> None:
        self._lock = lock
        self.lost = False

    def renew(self) -> None:
        """Give a sign of life.

        Raises:
            RedisError: Redis does not answer.
        """
        try:
            self._lock.reacquire()
        except LockError:  # it has expired, or Redis was emptied: free again, unless somebody was faster
            self.lost = not self._lock.acquire(blocking=False, token=self._lock.local.token)

    def take(self) -> bool:
        """Try to get it.

        Raises:
            RedisError: Redis does not answer.
        """
        return bool(self._lock.acquire(blocking=False))

    def give_up(self) -> None:
        """Let others have it."""
        try:
            self._lock.release()
        except LockError:
            pass  # it was lost
        except RedisError as exc:
            logger.warning("cannot give a lease up, it expires by itself: %s", exc)


class Leases:
    """The leases of this process, renewed from one thread; a context manager."""

    def __init__(self, redis: Redis, lease_s: float) -> None:
        self._redis = redis
        self._lease_s = lease_s
        self._held: set[Lease] = set()
        self._guard = threading.Lock()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._renew_all, name="leases", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._leaving.set()
        self._thread.join()

    def acquire(self, key: str) -> Lease | None:
        """Take the lease `key`, or return None if somebody else has it.

        Raises:
            RedisError: Redis does not answer.
        """
        # The thread that renews is another than the one that took it.
        lease = Lease(Lock(self._redis, key, timeout=self._lease_s, thread_local=False))
        if not lease.take():
            return None
        with self._guard:
            self._held.add(lease)
        return lease

    def release(self, lease: Lease) -> None:
        """Give a lease up."""
        with self._guard:
            self._held.discard(lease)
        if not lease.lost:
            lease.give_up()

    @contextmanager
    def held(self, key: str) -> Iterator[Lease | None]:
        """Have the lease `key` for a while; None if somebody else has it.

        Raises:
            RedisError: Redis does not answer.
        """
        lease = self.acquire(key)
        try:
            yield lease
        finally:
            if lease is not None:
                self.release(lease)

    def renew(self, lease: Lease) -> None:
        """Renew a lease at once, if Redis answers and it is not lost."""
        with self._guard:
            self._renew(lease)

    def _renew_all(self) -> None:
        while not self._leaving.wait(self._lease_s / _RENEWALS):
            with self._guard:
                for lease in self._held:
                    self._renew(lease)

    @staticmethod
    def _renew(lease: Lease) -> None:
        try:
            if not lease.lost:
                lease.renew()
        except RedisError as exc:
            logger.warning("cannot renew a lease, will try again: %s", exc)
