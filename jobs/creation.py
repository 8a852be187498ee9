"""A new job, from prompts that are read once to files that stay."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime

from jobs.chunking import Chunk, ChunkLimits, Sizes, cut
from jobs.errors import NoPromptsError, NotEnoughSpaceError
from jobs.layout import JobNames, idempotency_digest, job_names
from jobs.parts import write_prompts
from jobs.publishing import publish
from jobs.records import ChunkStarts, EncoderInfo, JobOptions, JobRecord, Prompt, as_json
from jobs.storage import Storage

# Chunks that are written at the same time: an object store takes long for each, a disk for making it last.
_WRITERS = 8


def create_job(
    storage: Storage,
    job_id: str,
    prompts: Iterable[Prompt],
    *,
    options: JobOptions,
    encoder: EncoderInfo,
    limits: ChunkLimits,
    metadata: Mapping[str, str],
    reserve_bytes: int,
    owner: str | None,
    idempotency_key: str | None,
) -> JobRecord:
    """Write the files of a new job, `job.json` last; see `JobStore.create`."""
    created_at = datetime.now(UTC)
    names = job_names(job_id)
    dtype = options.dtype or encoder.dtype
    limits = ChunkLimits(options.chunk_rows or limits.prompts, options.chunk_tokens or limits.tokens)
    sizes = Sizes.of(encoder, options.layout, dtype)
    try:
        starts, num_rows = _write_chunks(storage, names, cut(prompts, sizes, limits), sizes, reserve_bytes)
        record = JobRecord(
            id=job_id,
            created_at=created_at,
            num_prompts=starts[-1],
            num_chunks=len(starts) - 1,
            chunk_rows=limits.prompts,
            chunk_tokens=limits.tokens,
            deduplicate=options.deduplicate,
            estimated_bytes=sizes.stored_bytes(num_rows, len(starts) - 1),
            dtype=dtype,
            layout=options.layout,
            compression=options.compression,
            fingerprint=encoder.fingerprint,
            metadata=dict(metadata),
            on_error=options.on_error,
            owner=owner,
            idempotency=None if idempotency_key is None else idempotency_digest(owner, idempotency_key),
        )
        storage.write(names.chunks, as_json(ChunkStarts(starts=tuple(starts))))
    except BaseException:
        _clean_up(storage, names)
        raise
    try:
        published = publish(storage, record)
    except BaseException:
        if record.idempotency is None:  # else it may be there for somebody who asked with the same key
            _clean_up(storage, names)
        raise
    if published.id != job_id:
        _clean_up(storage, names)
    return published


def _clean_up(storage: Storage, names: JobNames) -> None:
    storage.delete(names.record)
    storage.delete_folder(names.folder)


def _write_chunks(
    storage: Storage, names: JobNames, chunks: Iterator[Chunk], sizes: Sizes, reserve_bytes: int
) -> tuple[list[int], int]:
    """Write the prompts -> the position of each chunk's first, and of the end; rows to be stored of all."""
    starts, num_rows, free_bytes = [0], 0, storage.free_bytes()
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="prompts") as pool:
        try:
            for chunk in chunks:
                starts.append(chunk.start + len(chunk.prompts))
                num_rows += chunk.rows
                needed_bytes = sizes.stored_bytes(num_rows, chunk.index + 1)
                if free_bytes is not None and needed_bytes > max(0, free_bytes - reserve_bytes):
                    # What waits is for nothing then.
                    raise NotEnoughSpaceError(needed_bytes, free_bytes, reserve_bytes)  # noqa: TRY301
                pending.append(pool.submit(_write_chunk, storage, names.prompts(chunk.index), chunk))
                if len(pending) > 2 * _WRITERS:
                    pending.popleft().result()
            while pending:
                pending.popleft().result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if len(starts) == 1:
        raise NoPromptsError("a job needs at least one prompt")
    return starts, num_rows


def _write_chunk(storage: Storage, name: str, chunk: Chunk) -> None:
    content = io.BytesIO()
    write_prompts(content, chunk.start, chunk.prompts)
    storage.write(name, content.getvalue())
