"""Every key in Redis that we touch. None holds what a job needs: ours expire, but for the set of worker ids."""

from __future__ import annotations

WORKER_TTL_S = 6
REPLY_TTL_S = 120
PROGRESS_TTL_S = 600
EVENTS_TTL_S = 600
CANCELLED_TTL_S = 86_400
MAX_EVENTS = 100_000
MAX_QUEUE = 1000

WORKER_IDS = "layerstack:workers"
"""Set of the ids of workers; some may have died."""

EVENTS = "layerstack:events"
"""List of JSON `JobEvent`, for the reconciler; what is lost there, it finds in the files."""

PREDICT_WAITING = "layerstack:predict:waiting"
"""Sorted set request id -> deadline, of /predict requests that have been accepted and not answered."""

PREDICT_ANSWERED = "layerstack:predict:answered"
"""List of when the last /predict requests were answered since the queue was last empty, newest first."""

WITHDRAWN = "layerstack:withdrawn"
"""Channel that tells workers the ids of /predict requests nobody waits for any more."""

QUEUE = "layerstack:queue"
"""JSON list of the ids of unfinished jobs, oldest first, the first `MAX_QUEUE` of them; the reconciler renews it."""

JOB_COUNTS = "layerstack:job-counts"
"""Hash status -> number of jobs, as far as the reconciler knows, which renews it once it has looked at all."""

RECONCILER = "layerstack:reconciler"
"""Lease of the one worker that reconciles."""

RATE_LIMIT = "layerstack:rate"
"""Prefix of the counters of rate limits; they expire with their windows."""


def worker(worker_id: str) -> str:
    """JSON `WorkerPresence` of a loaded worker; expires unless the worker renews it."""
    return f"layerstack:worker:{worker_id}"


def encoder(fingerprint: str) -> str:
    """Safetensors with the constant rows of an encoder; renewed with the worker's presence."""
    return f"layerstack:encoder:{fingerprint}"


def reply(request_id: str) -> str:
    """List that gets the one reply to a predict request."""
    return f"layerstack:reply:{request_id}"


def withdrawn(request_id: str) -> str:
    """Set when nobody waits for a predict request any more, for workers that have not begun it."""
    return f"layerstack:withdrawn:{request_id}"


def progress(job_id: str) -> str:
    """Hash chunk -> rows encoded so far, of chunks that have been begun and not put down."""
    return f"layerstack:progress:{job_id}"


def lease(job_id: str, chunk: int) -> str:
    """Held by the worker that works on a chunk, for as long as it renews it."""
    return f"layerstack:lease:{job_id}:{chunk}"


def trouble(job_id: str) -> str:
    """Why a job waits for its storage; expires unless it still does."""
    return f"layerstack:trouble:{job_id}"


def cancelled(job_id: str) -> str:
    """Set when a job is cancelled, or fails with `on_error` "fail", so that workers see it at once; its files count."""
    return f"layerstack:cancelled:{job_id}"
