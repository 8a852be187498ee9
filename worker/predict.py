"""One predict request: its prompts in, a reply out."""

from __future__ import annotations

import time

import numpy as np

from encoder import Encoder, PromptError
from jobs.messages import PredictFailure, PredictMessage, PredictReply
from worker.rows import to_numpy


def answer(encoder: Encoder, message: PredictMessage) -> PredictReply | PredictFailure:
    """Encode the prompts of a request, or say which of them cannot be."""
    started = time.perf_counter()
    try:
        encodings = encoder.encode(message.prompts)
    except PromptError as exc:
        return PredictFailure(position=exc.position, reason=exc.reason)
    return PredictReply(
        fingerprint=encoder.fingerprint,
        max_length=encoder.config.max_length,
        own_rows=[to_numpy(encoding.own_rows) for encoding in encodings],
        encode_ms=(time.perf_counter() - started) * 1e3,
        num_tokens=np.array([encoding.num_tokens for encoding in encodings], dtype=np.int32),
        truncated=np.array([encoding.truncated for encoding in encodings], dtype=np.bool_),
    )
