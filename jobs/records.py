"""The records that are stored, sent and shown. All are frozen, and those that outlive a process are versioned."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from jobs.tensors import DtypeName

ULID_PATTERN = r"^[0-9A-HJKMNP-TV-Z]{26}$"
Ulid = Annotated[str, StringConstraints(pattern=ULID_PATTERN)]
JobId = Ulid
"""A ULID: job ids sort by the time of their making, and are safe as folder names."""


OnError = Literal["continue", "fail"]
Layout = Literal["own_rows", "dense"]
Compression = Literal["none", "zstd"]
MAX_CHUNK_TOKENS = 32_768
"""Of the real encoder that is a part of 1 to 2 GB. Object stores take 5 GB at once, and a chunk may have more tokens
than its prompts' lengths tell."""


class Record(BaseModel):
    """Base of what is asked and stored: frozen, and an unknown field is an error, never dropped silently."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StrictRecord(Record):
    """Base of what a client sends: no value is turned into another type."""

    model_config = ConfigDict(strict=True)


class View(BaseModel):
    """Base of what is shown: frozen, and a reader ignores fields that a later version adds."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class JobStatus(StrEnum):
    """Where a job stands. It follows from the job's files; live progress only adds what has started."""

    QUEUED = "queued"
    """Accepted and stored; no chunk has started."""
    RUNNING = "running"
    """At least one chunk has started."""
    PAUSED = "paused"
    """The storage is full or fails, or no worker has the job's encoder; it goes on by itself once there is."""
    SUCCEEDED = "succeeded"
    """The manifest is written; rows that failed on their own are counted in it."""
    FAILED = "failed"
    """A chunk was given up, and all others are done, or are not begun for it (`on_error`): `retry` does the rest."""
    CANCELLING = "cancelling"
    """Asked to stop; a chunk is still being put down."""
    CANCELLED = "cancelled"
    """Stopped; the parts that are done stay readable, `retry` does the rest."""
    EXPIRED = "expired"
    """Its time is up: the results are deleted, the record stays."""

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens to the job unless somebody asks for it."""
        return self in _FINAL


_FINAL = {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED}


class JobOptions(StrictRecord):
    """How a job's results are stored."""

    dtype: DtypeName | None = Field(None, description="dtype of the stored rows; default the encoder's own")
    layout: Layout = Field(
        "own_rows", description="'own_rows' stores a prompt's own rows and the constants once; 'dense' all rows of each"
    )
    compression: Compression = Field("none", description="of the Parquet columns")
    chunk_rows: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None, description="prompts in one part, at most; default the server's setting"
    )
    chunk_tokens: Annotated[int, Field(ge=1, le=MAX_CHUNK_TOKENS)] | None = Field(
        None, description="estimated tokens in one part, at most; default the server's setting"
    )
    deduplicate: bool = Field(True, description="whether prompts that are the same are encoded once")
    on_error: OnError = Field(
        "continue", description="'fail' ends the job at the first prompt that fails on its own; 'continue' notes it"
    )


class EncoderInfo(View):
    """What a loaded encoder says of itself.

    `embed_dim` is D, the number of layers times the hidden size; `num_prefix_tokens` is P. With padding on the right,
    pad rows depend on the prompt, and are among its own rows.
    """

    model: str
    revision: str | None
    preset: str
    layers: tuple[int, ...]
    max_length: int
    embed_dim: int
    num_prefix_tokens: int
    padding_side: Literal["left", "right"] = "left"
    dtype: DtypeName
    device: str
    fingerprint: str
    random_weights: bool


class WorkerCounters(Record):
    """What a worker has counted since its start, and what waits now. `encoder.EngineStats` says what each means."""

    token_budget: int
    waiting_prompts: dict[Literal["interactive", "bulk"], int]
    waiting_rows: int
    batches_waited: dict[Literal["interactive", "bulk"], int]
    batches: int
    prompts: int
    rows: int
    capacity: int
    tokenize_seconds: float
    queue_seconds: float
    encode_seconds: float
    out_of_memory: int
    failed_prompts: int
    dropped_prompts: int
    written_parts: int = Field(description="that have been checked and count")
    written_rows: int
    written_bytes: int


class WorkerPresence(Record):
    """A worker that has loaded its encoder, as it announces itself in Redis."""

    worker_id: str
    host: str
    started_at: datetime
    encoder: EncoderInfo
    counters: WorkerCounters | None = None


class Prompt(Record):
    """One prompt of a job, with the caller's id for it."""

    id: str
    prompt: str


class JobRecord(Record):
    """`job.json`: what was asked. Written once, after the prompts, and never changed."""

    version: Literal[1] = 1
    id: JobId
    created_at: datetime
    num_prompts: int
    num_chunks: int
    chunk_rows: int
    chunk_tokens: int
    deduplicate: bool
    estimated_bytes: int = Field(description="of all parts, from the lengths of the prompts")
    dtype: DtypeName
    layout: Layout
    compression: Compression
    fingerprint: str = Field(description="of the encoder; results of another are never mixed in")
    metadata: dict[str, str]
    on_error: OnError = "continue"
    owner: str | None = Field(None, description="name of the key that made it; null if there were no keys")
    idempotency: str | None = Field(None, description="digest that names the marker of its `Idempotency-Key`, if any")


class IdempotencyMarker(Record):
    """`idempotency/{digest}.json`: the job that an `Idempotency-Key` has made, before or after that job is there."""

    version: Literal[1] = 1
    record: JobRecord


class ChunkFailure(Record):
    """`failures/{chunk}.json`: what went wrong with a chunk as a whole, and how often."""

    version: Literal[1] = 1
    chunk: int
    attempts: int = Field(description="that ended in an error")
    crashes: int = Field(description="attempts whose worker died, through this chunk or by chance")
    gave_up: bool = Field(description="the attempts are used up: the job will have failed")
    error: str
    failed_at: datetime


class Mark(Record):
    """`started`, `cancelled` and `expired`: when that was."""

    version: Literal[1] = 1
    at: datetime


class ChunkStarts(Record):
    """`chunks.json`: how the prompts are cut into chunks. Never changed."""

    version: Literal[1] = 1
    starts: tuple[int, ...] = Field(description="position of each chunk's first prompt, and the number of prompts")


class PartSummary(View):
    """A finished part, as the manifest lists it."""

    index: int
    rows: int
    bytes: int
    sha256: str
    succeeded: int
    failed: int
    truncated: int
    tokens: int = Field(description="tokens of all prompts that succeeded, prefix included")


class RowError(View):
    """A row that failed on its own."""

    index: int
    id: str
    error: str


class PartReport(View):
    """`parts/{chunk}.json`: what is in a part. Written once the part has been checked: only then it counts."""

    version: Literal[1] = 1
    part: PartSummary
    errors: list[RowError] = Field(description="the first 1,000 rows that failed")


class Manifest(View):
    """`manifest.json`: written last, once every part is there."""

    version: Literal[1] = 1
    job_id: JobId
    fingerprint: str
    finished_at: datetime
    rows: int
    bytes: int
    succeeded: int
    failed: int
    truncated: int
    tokens: int
    parts: list[PartSummary]
    errors: list[RowError] = Field(description="the first 1,000 rows that failed; all of them are in the parts")


class PartView(View):
    """A finished part, as a job shows it."""

    index: int
    rows: int
    bytes: int
    url: str


class OptionsView(View):
    """How a job's results are stored, as a job shows it: also if nobody could ask for that any more."""

    dtype: DtypeName
    layout: Layout
    compression: Compression
    chunk_rows: int
    chunk_tokens: int
    deduplicate: bool
    on_error: OnError


class StateTimes(View):
    """When a job came into each of the states that it has reached; null for the others."""

    queued: datetime | None = None
    running: datetime | None = None
    succeeded: datetime | None = None
    failed: datetime | None = None
    cancelling: datetime | None = None
    cancelled: datetime | None = None
    expired: datetime | None = None


class JobView(View):
    """A job, as the API shows it."""

    id: JobId
    status: JobStatus
    created_at: datetime
    started_at: datetime | None = Field(description="when its first chunk was begun")
    finished_at: datetime | None
    times: StateTimes
    num_prompts: int
    num_done: int = Field(description="prompts encoded so far, those of unfinished parts included")
    num_succeeded: int | None = Field(
        description="rows with an embedding; of the finished parts until it has succeeded"
    )
    num_failed: int | None = Field(description="rows that failed on their own; likewise")
    num_truncated: int | None = Field(description="prompts cut to max_length; likewise")
    rate: float | None = Field(description="prompts a second lately; while it runs")
    eta_s: float | None = Field(description="seconds until it is done at that rate")
    queue_position: int | None = Field(description="unfinished jobs that were made before it; while it is queued")
    num_parts: int
    num_parts_done: int
    num_parts_failed: int = Field(0, description="parts whose chunk used up its attempts")
    estimated_bytes: int = Field(0, description="of all parts together, from the lengths of the prompts")
    options: OptionsView
    fingerprint: str
    metadata: dict[str, str]
    error: str | None
    parts: list[PartView] = Field(description="finished parts, the first of those that were asked for")
    parts_next: int | None = Field(description="give it as `parts_after` for more parts; null if there are none")


def as_json(record: Record | View) -> bytes:
    """Return a record as the content of a file."""
    return record.model_dump_json(indent=2).encode("utf-8") + b"\n"
