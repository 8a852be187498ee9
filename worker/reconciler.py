"""Sees to it that every chunk of every job is done: sends chunks, finds those that got lost, finishes jobs.

There is one in each worker; the one that has the lease works, the others wait for it. What is to be done it learns
from the files. Events in Redis only tell it sooner: emptying Redis costs a look at the files, never a chunk.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from celery import Celery
from kombu.exceptions import OperationalError
from pydantic import ValidationError
from redis import Redis, RedisError

from jobs import keys
from jobs.errors import JobNotFoundError, JobsError
from jobs.layout import JOBS, is_job_id
from jobs.messages import ChunkMessage, JobEvent
from jobs.progress import JobFiles
from jobs.queue import publish_chunks, waiting_chunks
from jobs.records import JobStatus, WorkerPresence
from jobs.store import JobStore
from worker.errors import WorkerError
from worker.finisher import Finisher
from worker.housekeeping import Housekeeper
from worker.knowledge import ActiveJob, FinishedJob, Knowledge, status_told_by
from worker.leases import Lease, Leases
from worker.notes import JobNotes
from worker.schedule import pause_s, shares

logger = logging.getLogger(__name__)
_SCAN_EVERY_S = 30.0
# Of the time, at most: large jobs take long to list.
_SCAN_SHARE = 0.05
# A scan of many jobs goes on in slices: those that are at work do not wait for it.
_SCAN_SLICE_S = 0.5
_SCAN_PAUSE_S = 0.01
# A finished job is looked at again only so often: it changes by `retry` and by time.
_FINISHED_JOBS_EVERY_S = 300.0
_LONGEST_WAIT_S = 1.0
_EVENTS_AT_ONCE = 1000
# Chunks in the queue: of all jobs together, unless there are more jobs than that; and of one job.
_SMALLEST_WINDOW = 16
_SMALLEST_SHARE = 2
_FINISH_AGAIN_SHOWN_S = 60.0
_LONGEST_LEASE_S = 10.0
# How long it is told which jobs there are, beyond three searches: a search may take long.
_OVERVIEW_SHOWN_S = 30.0


class _NotLeadingError(WorkerError):
    """Another worker has the reconciler's lease now."""


class Reconciler:
    """The loop; `run` is for a thread.

    Args:
        store: the jobs.
        redis: the broker.
        app: to send chunks.
        notes: what is told of jobs.
        housekeeper: tidies up on the way.
        fingerprint: of this worker's encoder.
        slots: chunks that one worker takes at a time.
        search_every_s: seconds between two searches for chunks that got lost.
        lease_s: seconds without a sign of life until a worker counts as dead.
        chunk_crashes: attempts whose worker died that a chunk has.
        read_all: whether each part is read before a job succeeds.
        stopping: set when the worker stops.
    """

    def __init__(
        self,
        *,
        store: JobStore,
        redis: Redis,
        app: Celery,
        notes: JobNotes,
        housekeeper: Housekeeper,
        fingerprint: str,
        slots: int,
        search_every_s: float,
        lease_s: float,
        chunk_crashes: int,
        read_all: bool,
        stopping: threading.Event,
    ) -> None:
        self._store = store
        self._redis = redis
        self._app = app
        self._notes = notes
        self._housekeeper = housekeeper
        self._fingerprint = fingerprint
        self._slots = slots
        self._search_every_s = search_every_s
        self._lease_s = lease_s
        self._own_lease_s = min(lease_s, _LONGEST_LEASE_S)
        self._leases = Leases(redis, self._own_lease_s)
        self._chunk_crashes = chunk_crashes
        self._stopping = stopping
        self._read_all = read_all

    def run(self) -> None:
        """Lead whenever nobody else does, until the worker stops."""
        with self._leases:
            while not self._stopping.is_set():
                try:
                    with self._leases.held(keys.RECONCILER) as lease:
                        if lease is not None:
                            self._lead(lease)
                except _NotLeadingError:
                    logger.warning("another worker reconciles now")
                except (RedisError, OperationalError) as exc:
                    logger.warning("the broker does not answer, the reconciler will try again: %s", exc)
                except Exception:  # whatever it is, no job may be left alone for it
                    logger.exception("the reconciler failed, and begins anew")
                self._stopping.wait(min(self._search_every_s, self._own_lease_s / 2))

    def _lead(self, lease: Lease) -> None:
        logger.info("reconciling")
        known = Knowledge()

        def should_stop() -> bool:
            return self._stopping.is_set() or lease.lost

        with Finisher(self._store, read_all=self._read_all, should_stop=should_stop) as finisher:
            while not self._stopping.is_set():
                if lease.lost:
                    raise _NotLeadingError
                now = time.monotonic()
                self._scan(known, now)
                wait_s = min(_LONGEST_WAIT_S, self._search_every_s)
                self._note_events(known, _SCAN_PAUSE_S if known.to_scan else wait_s)
                if now >= known.next_search:
                    known.next_search = now + self._search_every_s
                    known.has_news = True
                    self._find_lost(known)
                    self._see_workers(known)
                self._finish(known, finisher)
                self._send(known)
                self._tell(known)

    # What the files say.

    def _scan(self, known: Knowledge, now: float) -> None:
        """Go on looking at all jobs: the newest first, since old ones have mostly finished."""
        if not known.to_scan:
            if now < known.next_scan:
                return
            known.scan_s = 0.0
            with _tolerated("look for jobs"):
                known.begin_scan({name for name in self._store.storage.folders(JOBS) if is_job_id(name)}, now)
                known.has_scanned = known.has_scanned or not known.to_scan
                self._housekeeper.remove_unfinished_markers()
        while known.to_scan and not self._stopping.is_set():
            self._look_at(known, known.to_scan.pop())
            if time.monotonic() - now > _SCAN_SLICE_S:
                break
        known.scan_s += time.monotonic() - now
        if not known.to_scan:
            known.has_scanned = True
            known.next_scan = now + max(_SCAN_EVERY_S, known.scan_s / _SCAN_SHARE)

    def _look_at(self, known: Knowledge, job_id: str) -> None:
        """Learn from a job's files what there is to do."""
        known.finished.pop(job_id, None)
        with _tolerated(f"look at job {job_id}"):
            try:
                marks = self._store.marks(job_id)
                self._housekeeper.remove_unfinished(job_id)
                # Most jobs have ended long ago, which one listing tells.
                has_ended = job_id in known.expired or self._housekeeper.keeps(job_id, marks)
                files = None if has_ended else self._store.files(job_id)
            except JobNotFoundError:
                known.forget(job_id)
                self._housekeeper.remove_abandoned(job_id)
                return
            if files is None:
                self._note_finished(known, job_id, status_told_by(job_id, marks))
            elif files.status().is_final:
                status = files.status()
                if self._housekeeper.expire(job_id, files):
                    known.expired.add(job_id)
                    status = JobStatus.EXPIRED
                self._note_finished(known, job_id, status)
            else:
                self._note_active(known, files)

    def _note_finished(self, known: Knowledge, job_id: str, status: JobStatus) -> None:
        known.active.pop(job_id, None)
        begun = self._notes.begun(job_id)
        for chunk in (dead := self._without_worker(job_id, begun)):
            self._notes.put_down(job_id, chunk)
        # A worker that still puts a chunk down may die of it.
        pause = _SCAN_EVERY_S if begun - dead else _FINISHED_JOBS_EVERY_S
        known.finished[job_id] = FinishedJob(status, time.monotonic() + pause)

    def _note_active(self, known: Knowledge, files: JobFiles) -> None:
        job_id = files.record.id
        is_new = job_id not in known.active
        job = known.active.setdefault(job_id, ActiveJob.of(files.record))
        job.learn(files)
        if is_new:  # its workers may have died before this one led
            known.has_news = True
            self._recover_all(job, self._notes.begun(job_id))

    # What workers and clients say.

    def _note_events(self, known: Knowledge, wait_s: float) -> None:
        first = cast("tuple[bytes, bytes] | None", self._redis.blpop([keys.EVENTS], timeout=wait_s))
        if first is None:
            return
        others = cast("list[bytes] | None", self._redis.lpop(keys.EVENTS, _EVENTS_AT_ONCE)) or []
        to_look_at: dict[str, None] = {}  # each once: of a job that is cancelled, every chunk under way tells
        for content in [first[1], *others]:
            try:
                event = JobEvent.model_validate_json(content)
            except ValidationError:
                logger.exception("an event that cannot be read is dropped: %r", content)
                continue
            job = known.active.get(event.job_id)
            if event.chunk is None or job is None:
                to_look_at[event.job_id] = None
            elif 0 <= event.chunk < job.record.num_chunks:
                self._note_chunk(job, event.chunk, event.what)
        for job_id in to_look_at:
            self._look_at(known, job_id)

    def _note_chunk(self, job: ActiveJob, chunk: int, what: str) -> None:
        job_id, schedule = job.record.id, job.schedule
        if what == "done":
            schedule.done(chunk)
            job.has_started = True
            self._notes.no_trouble(job_id)
        elif what == "stalled":
            if (wait_s := schedule.stall(chunk, time.monotonic())) is not None:
                logger.warning("job %s waits %.0f s for its storage", job_id, wait_s)
        else:
            with _tolerated(f"read why a chunk of job {job_id} failed"):
                self._put_back(job, chunk)

    def _put_back(self, job: ActiveJob, chunk: int) -> None:
        """Send a chunk again, unless it has used up its attempts; the more of them failed, the later."""
        failure = self._store.failure(job.record.id, chunk)
        if failure is not None and failure.gave_up:
            logger.error("job %s: chunk %d is given up: %s", job.record.id, chunk, failure.error)
            job.schedule.give_up(chunk)
            if job.schedule.settled and not job.schedule.complete:
                self._notes.stopped(job.record.id)  # chunks of it may be under way, if it ends with the first failure
            return
        failures = failure.attempts + failure.crashes if failure is not None else 0
        job.schedule.put_back(chunk, time.monotonic() + (pause_s(failures) if failures else 0.0))

    # What nobody says.

    def _find_lost(self, known: Knowledge) -> None:
        """Find chunks that are neither in the queue nor with a living worker."""
        if not any(job.schedule.outstanding for job in known.active.values()):
            return
        waiting = waiting_chunks(self._redis, delivered_within_s=self._lease_s)
        for job_id, job in known.active.items():
            self._recover_all(job, {chunk for chunk in job.schedule.outstanding if (job_id, chunk) not in waiting})

    def _recover_all(self, job: ActiveJob, chunks: set[int]) -> None:
        """Have those of `chunks` done that no living worker has."""
        job_id = job.record.id
        if not chunks:
            return
        # A worker that dies has begun before and not put down since: others begin, or put down, while this looks.
        begun = self._notes.begun(job_id)
        lost = self._without_worker(job_id, chunks)
        if lost:
            begun &= self._notes.begun(job_id)
        with _tolerated(f"recover lost chunks of job {job_id}"):
            for chunk in sorted(lost):
                self._recover(job, chunk, begun=chunk in begun)

    def _recover(self, job: ActiveJob, chunk: int, *, begun: bool) -> None:
        job_id = job.record.id
        if self._store.has_part(job_id, chunk):
            job.schedule.done(chunk)
            return
        if begun:
            # The broker delivers the dead worker's message once more: nobody begins before the crash is noted.
            with self._leases.held(keys.lease(job_id, chunk)) as lease:
                if lease is None:
                    return  # somebody has just begun
                logger.warning("job %s: the worker of chunk %d has died", job_id, chunk)
                self._store.note_failure(job_id, chunk, "its worker died", crashed=True, limit=self._chunk_crashes)
                self._notes.put_down(job_id, chunk)
        self._put_back(job, chunk)

    def _without_worker(self, job_id: str, chunks: set[int]) -> set[int]:
        """Return those of `chunks` that no living worker has."""
        ordered = sorted(chunks)
        if not ordered:
            return set()
        with self._redis.pipeline(transaction=False) as pipe:
            for chunk in ordered:
                pipe.exists(keys.lease(job_id, chunk))
            return {chunk for chunk, alive in zip(ordered, pipe.execute(), strict=True) if not alive}

    # What follows.

    def _finish(self, known: Knowledge, finisher: Finisher) -> None:
        """Finish jobs whose chunks are all done; parts that turn out damaged are done anew."""
        finisher.finish([job_id for job_id, job in known.active.items() if job.schedule.complete])
        for job_id, outcome in finisher.finished():
            if isinstance(outcome, Exception):
                self._notes.trouble(job_id, str(outcome), _FINISH_AGAIN_SHOWN_S)
            elif outcome and job_id in known.active:
                for chunk in outcome:
                    known.active[job_id].schedule.put_back(chunk)
                continue
            self._look_at(known, job_id)

    def _send(self, known: Knowledge) -> None:
        """Send what is due, and drop jobs that have failed."""
        for job_id, job in list(known.active.items()):
            if job.schedule.settled and not job.schedule.complete:
                self._look_at(known, job_id)
        runnable = [job for job in known.active.values() if job.record.fingerprint in known.encoders]
        total = max(_SMALLEST_WINDOW, 4 * known.num_workers * self._slots)
        windows = shares([job.schedule.demand for job in runnable], total, least=_SMALLEST_SHARE)
        for job, window in zip(runnable, windows, strict=True):
            chunks = job.schedule.due(time.monotonic(), window)
            if chunks:
                publish_chunks(self._app, (ChunkMessage(job_id=job.record.id, chunk=chunk) for chunk in chunks))

    def _see_workers(self, known: Knowledge) -> None:
        """Find out which encoders there are; a job for one that nobody has loaded waits for it."""
        names = sorted(name.decode() for name in cast("set[bytes]", self._redis.smembers(keys.WORKER_IDS)))
        found = self._redis.mget([keys.worker(name) for name in names]) if names else []
        workers = [WorkerPresence.model_validate_json(content) for content in found if content is not None]
        known.num_workers = max(1, len(workers))
        known.encoders = {worker.encoder.fingerprint for worker in workers} | {self._fingerprint}
        for job_id, job in known.active.items():
            if job.record.fingerprint not in known.encoders:
                reason = f"no worker has loaded the encoder {job.record.fingerprint}, which the job was made for"
                self._notes.trouble(job_id, reason, 3 * self._search_every_s)

    def _tell(self, known: Knowledge) -> None:
        """Tell which jobs there are, once all have been looked at: a position in part of the queue would be wrong."""
        if known.has_scanned and known.has_news:
            known.has_news = False
            queue = known.queue()
            counts = known.counts(self._notes.troubled(queue))
            self._notes.overview(queue, counts, 3 * self._search_every_s + _OVERVIEW_SHOWN_S)


@contextmanager
def _tolerated(what: str) -> Iterator[None]:
    """Let a fault of the storage, or of one job's files, stop neither the loop nor the other jobs."""
    try:
        yield
    except JobsError as exc:
        logger.warning("cannot %s, will try again: %s", what, exc)
