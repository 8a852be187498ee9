"""What a worker answered to POST /predict, before it takes the form that the client asked for."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.tensors import Array


@dataclass(frozen=True, eq=False)
class ConstantRows:
    """The rows that are the same for every prompt of an encoder, in its dtype.

    Attributes:
        prefix_rows: `[P, D]`.
        pad_row: `[D]`.
    """

    prefix_rows: Array
    pad_row: Array


@dataclass(frozen=True, eq=False)
class Prediction:
    """The rows of a request's prompts. Dense, a prompt is pad rows, prefix rows and own rows: `[max_length, D]`.

    Attributes:
        own_rows: one `[n, D]` a prompt, in the encoder's dtype.
        constants: what comes before them.
        max_length: rows of a dense prompt, L.
        num_tokens: `[B]`, prefix included.
        truncated: `[B]`.
        fingerprint: of the encoder.
        encode_ms: milliseconds from the worker's submission to the engine to the rows.
        queue_ms: milliseconds of the request before that, and after it until the reply was there.
    """

    own_rows: list[Array]
    constants: ConstantRows
    max_length: int
    num_tokens: Array
    truncated: Array
    fingerprint: str
    encode_ms: float
    queue_ms: float
