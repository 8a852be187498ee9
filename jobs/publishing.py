"""From stored prompts to a job that is there: once, however often a client asks for it with the same key.

A job exists once its `job.json` does. One with an `Idempotency-Key` has a marker, which is claimed just before: the
first writer wins. The marker holds the whole record, so whoever finds one without its job can write `job.json` in place
of a server that died, or is slow. A job that is deleted loses its marker before its `job.json`: a marker without a job
therefore never brings a deleted job back.

One case is left: a server dies between marker and `job.json`, nobody asks again until the prompts have been removed as
abandoned, and then two servers do at the very same moment, each between the other's reading of the old marker and its
writing of the new one. They may make a job each.
"""

from __future__ import annotations

import logging

from pydantic import ValidationError

from jobs.errors import StorageError
from jobs.layout import idempotency_marker, job_names
from jobs.records import IdempotencyMarker, JobRecord, as_json
from jobs.storage import Storage

logger = logging.getLogger(__name__)
_CLAIM_ATTEMPTS = 10


def publish(storage: Storage, record: JobRecord) -> JobRecord:
    """Let a job exist whose other files are stored, unless its key has made another one.

    Returns:
        The record of the job that exists: `record`, or that of the other one.

    Raises:
        StorageError: somebody has deleted files of the job meanwhile, or the storage failed.
    """
    digest = record.idempotency
    if digest is not None and (earlier := _claim(storage, digest, record)) is not None:
        return earlier
    if not _write(storage, record):
        raise StorageError(f"{job_names(record.id).prompts_folder}: prompts of the new job have been deleted")
    if digest is None:
        return record
    # Who took the marker for one that was left behind did not see job.json, and makes another job.
    found = find(storage, digest)
    if found is None:
        raise StorageError(f"{job_names(record.id).folder}: the new job has been deleted")
    return found


def find(storage: Storage, digest: str) -> JobRecord | None:
    """Return the job that a key has made, if it still exists."""
    claimed = _read(storage, digest)
    return claimed if claimed is not None and _is_there(storage, digest, claimed) else None


def withdraw(storage: Storage, record: JobRecord) -> None:
    """Let a job exist no more; its other files stay."""
    digest = record.idempotency
    if digest is not None:
        claimed = _read(storage, digest)
        if claimed is not None and claimed.id == record.id:
            storage.delete(idempotency_marker(digest))
    storage.delete(job_names(record.id).record)


def _claim(storage: Storage, digest: str, record: JobRecord) -> JobRecord | None:
    """Make the key's marker tell of `record` -> the job that it tells of instead, if that is there."""
    name, content = idempotency_marker(digest), as_json(IdempotencyMarker(record=record))
    for _ in range(_CLAIM_ATTEMPTS):
        try:
            with storage.new_file(name) as file:
                file.write(content)
        except FileExistsError:
            claimed = _read(storage, digest)
            if claimed is not None and _is_there(storage, digest, claimed):
                return claimed
            if _read(storage, digest) == claimed:
                storage.delete(name)
        else:
            return None
    raise StorageError(f"{name}: is taken and given up all the time")


def _is_there(storage: Storage, digest: str, claimed: JobRecord) -> bool:
    """Whether the job exists that a marker tells of; makes it exist if only its `job.json` is missing."""
    names = job_names(claimed.id)
    if storage.size(names.record) is not None:
        return True
    # The marker is read once more: if the job had been deleted, it was gone before job.json was.
    if _read(storage, digest) != claimed or storage.size(names.chunks) is None or not _has_prompts(storage, claimed):
        return False
    return _write(storage, claimed)


def _write(storage: Storage, record: JobRecord) -> bool:
    """Write `job.json`, unless somebody took the folder for abandoned meanwhile -> whether the job exists."""
    name = job_names(record.id).record
    storage.write(name, as_json(record))
    if _has_prompts(storage, record):
        return True
    storage.delete(name)
    return False


def _has_prompts(storage: Storage, record: JobRecord) -> bool:
    return len(storage.files(job_names(record.id).prompts_folder)) == record.num_chunks


def _read(storage: Storage, digest: str) -> JobRecord | None:
    """Return what a marker tells. One that cannot be read tells nothing: it holds no rows, and is replaced."""
    name = idempotency_marker(digest)
    try:
        return IdempotencyMarker.model_validate_json(storage.read(name)).record
    except FileNotFoundError:
        return None
    except ValidationError as exc:
        logger.error("%s is damaged, or of another version of layerstack: %s", name, exc)  # noqa: TRY400 - it says it all
        return None
