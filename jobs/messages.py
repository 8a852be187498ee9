"""What crosses the queue: small frozen records in JSON, and one reply in safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from jobs.errors import TensorFormatError
from jobs.records import JobId, Record, Ulid
from jobs.tensors import Array, load_tensors, save_tensors


class ChunkMessage(Record):
    """Encode one chunk of a job. Everything else is in the job's files."""

    version: Literal[1] = 1
    job_id: JobId
    chunk: Annotated[int, Field(ge=0)]


class JobEvent(Record):
    """Something has happened to a job that the reconciler would else find out only at its next look."""

    version: Literal[1] = 1
    job_id: JobId
    chunk: int | None = Field(None, description="which chunk it is about, if it is about one")
    what: Literal["changed", "done", "failed", "stalled"] = "changed"


class PredictMessage(Record):
    """Encode a few prompts now, and push the reply to `keys.reply(request_id)`."""

    version: Literal[1] = 1
    request_id: Ulid
    prompts: list[str]
    deadline: float = Field(description="seconds since the epoch; the answer is of no use after it")


class PredictFailure(Record):
    """Why a predict request got no rows."""

    position: int | None = Field(description="which prompt is to blame, if one is")
    reason: str


@dataclass(frozen=True, eq=False)
class PredictReply:
    """The rows of a predict request.

    Attributes:
        fingerprint: of the encoder that made them.
        max_length: rows of a dense prompt.
        encode_ms: milliseconds that the encoder took.
        own_rows: one `[n, D]` array a prompt.
        num_tokens: `[B]`, prefix included.
        truncated: `[B]`.
    """

    fingerprint: str
    max_length: int
    encode_ms: float
    own_rows: list[Array]
    num_tokens: Array
    truncated: Array


def pack_reply(reply: PredictReply | PredictFailure) -> bytes:
    """Return the bytes of a reply: a safetensors file, without tensors if it tells of a failure."""
    if isinstance(reply, PredictFailure):
        return save_tensors({}, {"failure": reply.model_dump_json()})
    return save_tensors(
        {
            "own_rows": np.concatenate(reply.own_rows),  # (sum of n, D)
            "lengths": np.array([len(rows) for rows in reply.own_rows], dtype=np.int64),  # (B,)
            "num_tokens": reply.num_tokens,
            "truncated": reply.truncated,
        },
        {
            "fingerprint": reply.fingerprint,
            "max_length": str(reply.max_length),
            "encode_ms": str(reply.encode_ms),
        },
    )


def unpack_reply(content: bytes) -> PredictReply | PredictFailure:
    """Read what `pack_reply` wrote.

    Raises:
        TensorFormatError: the bytes are no reply.
    """
    tensors, metadata = load_tensors(content)
    if "failure" in metadata:
        return PredictFailure.model_validate_json(metadata["failure"])
    try:
        return PredictReply(
            fingerprint=metadata["fingerprint"],
            max_length=int(metadata["max_length"]),
            encode_ms=float(metadata["encode_ms"]),
            own_rows=np.split(tensors["own_rows"], np.cumsum(tensors["lengths"])[:-1]),
            num_tokens=tensors["num_tokens"],
            truncated=tensors["truncated"],
        )
    except KeyError as exc:
        raise TensorFormatError(f"a reply without {exc}") from exc
