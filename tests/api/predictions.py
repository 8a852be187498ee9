"""Predictions as a worker's reply makes them, and what they look like dense."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from api.prediction import ConstantRows, Prediction
from jobs.tensors import DTYPES, Array, DtypeName

MAX_LENGTH = 24
PREFIX_ROWS = 5


@dataclass(frozen=True, eq=False)
class Sample:
    """A prediction, and the rows and positions that each of its prompts has in an answer.

    Attributes:
        dense: `[B, L, D]`.
        real: one `[num_tokens, D]` a prompt.
        starts: the position of the first of those rows.
    """

    prediction: Prediction
    dense: Array
    real: list[Array]
    starts: list[int]


def sample(
    num_tokens: list[int], *, embed_dim: int = 9, dtype: DtypeName = "float32", right_padded: bool = False
) -> Sample:
    """Return random rows for prompts of so many tokens each, prefix included."""
    rng = np.random.default_rng(7)

    def rows(count: int) -> Array:
        return (rng.standard_normal((count, embed_dim)) * 3).astype(DTYPES[dtype])

    prefix, pad_row = rows(PREFIX_ROWS), rows(1)[0]
    own = [rows((MAX_LENGTH if right_padded else count) - PREFIX_ROWS) for count in num_tokens]
    prompts = [np.concatenate([prefix, each]) for each in own]
    pads = [np.broadcast_to(pad_row, (MAX_LENGTH - len(each), embed_dim)) for each in prompts]
    return Sample(
        Prediction(
            own_rows=own,
            constants=ConstantRows(prefix, pad_row),
            max_length=MAX_LENGTH,
            num_tokens=np.array(num_tokens, dtype=np.int32),
            truncated=np.array([count == MAX_LENGTH for count in num_tokens]),
            fingerprint="0123456789abcdef",
            encode_ms=12.3456,
            queue_ms=0.5,
        ),
        dense=np.stack([np.concatenate(each) for each in zip(pads, prompts, strict=True)]),
        real=[each[:count] for each, count in zip(prompts, num_tokens, strict=True)],
        starts=[0 if right_padded else MAX_LENGTH - count for count in num_tokens],
    )
