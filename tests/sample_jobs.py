"""Jobs and parts that no encoder made, for tests that are about files."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import UTC, datetime

import numpy as np
from redis import Redis
from ulid import ULID

from jobs import keys
from jobs.chunking import ChunkLimits
from jobs.parts import EncodedRow, PartHeader, PartWriter
from jobs.records import (
    MAX_CHUNK_TOKENS,
    EncoderInfo,
    JobOptions,
    JobRecord,
    PartReport,
    Prompt,
    WorkerCounters,
    WorkerPresence,
)
from jobs.results import DigestingFile
from jobs.store import JobStore

INFO = EncoderInfo(
    model="m",
    revision=None,
    preset="flux2-dev",
    layers=(1, 2),
    max_length=16,
    embed_dim=4,
    num_prefix_tokens=2,
    dtype="float32",
    device="cpu",
    fingerprint="0123456789abcdef",
    random_weights=True,
)
"""A small encoder that nobody loads."""

COUNTERS = WorkerCounters(
    token_budget=1024,
    waiting_prompts={"interactive": 3, "bulk": 7},
    waiting_rows=130,
    batches_waited={"interactive": 1, "bulk": 9},
    batches=11,
    prompts=13,
    rows=5000,
    capacity=8000,
    tokenize_seconds=0.25,
    queue_seconds=1.5,
    encode_seconds=2.5,
    out_of_memory=2,
    failed_prompts=4,
    dropped_prompts=5,
    written_parts=6,
    written_rows=600,
    written_bytes=60_000,
)
"""What a worker may have counted."""


def announce(redis: Redis, encoder: EncoderInfo = INFO) -> None:
    """Announce a worker that has loaded an encoder, for a while."""
    presence = WorkerPresence(worker_id=str(ULID()), host="here", started_at=datetime.now(UTC), encoder=encoder)
    redis.set(keys.worker(presence.worker_id), presence.model_dump_json(), ex=300)
    redis.sadd(keys.WORKER_IDS, presence.worker_id)


def make_job(
    store: JobStore,
    count: int = 10,
    chunk_rows: int = 4,
    *,
    prompts: Iterable[Prompt] | None = None,
    encoder: EncoderInfo = INFO,
    reserve_bytes: int = 0,
    owner: str | None = None,
    idempotency_key: str | None = None,
    **options: object,
) -> JobRecord:
    """Store a job of `count` prompts; its encoder is one that nobody has."""
    return store.create(
        (Prompt(id=f"id{n}", prompt=f"prompt {n}") for n in range(count)) if prompts is None else prompts,
        options=JobOptions(**options),
        encoder=encoder,
        limits=ChunkLimits(chunk_rows, MAX_CHUNK_TOKENS),
        metadata={"k": "v"},
        reserve_bytes=reserve_bytes,
        owner=owner,
        idempotency_key=idempotency_key,
    )


def write_part(
    store: JobStore, record: JobRecord, chunk: int, bad: Collection[int] = (), **header: object
) -> PartReport:
    """Write the part of a chunk, with errors in the rows `bad`; it does not count yet."""
    head = PartHeader.build(
        **{"layout": record.layout, "dtype": record.dtype, "fingerprint": record.fingerprint} | header,
        max_length=16, layers=(1, 2), prefix_rows=np.zeros((2, 4), np.float32), pad_row=np.zeros(4, np.float32),
    )  # fmt: skip
    with store.new_part(record.id, chunk) as file:
        digesting = DigestingFile(file)
        with PartWriter(digesting, head, record.compression) as part:
            for index, prompt in store.prompts(record.id, chunk):
                if index in bad:
                    part.write(EncodedRow(index, prompt.id, prompt.prompt, error="bad"))
                else:
                    part.write(EncodedRow(index, prompt.id, prompt.prompt, np.ones((1, 4), np.float32), 3, index == 0))
    return part.counts.report(chunk, digesting.size, digesting.sha256)


def do_chunk(store: JobStore, record: JobRecord, chunk: int, bad: Collection[int] = ()) -> PartReport:
    """Write the part of a chunk, and let it count."""
    report = write_part(store, record, chunk, bad)
    store.count_part(record.id, report)
    return report
