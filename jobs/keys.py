"""Every key in Redis that we touch. None holds what a job needs: ours expire, but for the set of worker ids."""

from __future__ import annotations

WORKER_TTL_S = 15
REPLY_TTL_S = 120
PROGRESS_TTL_S = 600

KOMBU_UNACKED_INDEX = "unacked_index"
"""kombu's own: delivery tag -> when the message was taken. Past the visibility timeout it is delivered again."""

WORKER_IDS = "layerstack:workers"
"""Set of the ids of workers; some may have died."""


def worker(worker_id: str) -> str:
    """JSON `WorkerPresence` of a loaded worker; expires unless the worker renews it."""
    return f"layerstack:worker:{worker_id}"


def encoder(fingerprint: str) -> str:
    """Safetensors with the constant rows of an encoder; renewed with the worker's presence."""
    return f"layerstack:encoder:{fingerprint}"


def reply(request_id: str) -> str:
    """List that gets the one reply to a predict request."""
    return f"layerstack:reply:{request_id}"


def progress(job_id: str) -> str:
    """Hash chunk -> rows encoded so far, of chunks being worked on."""
    return f"layerstack:progress:{job_id}"
