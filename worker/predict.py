"""One predict request: its prompts in, a reply out."""

from __future__ import annotations

import time

import numpy as np

from encoder import Encoding, Engine, Priority, PromptError
from jobs import tracing
from jobs.messages import PredictFailure, PredictMessage, PredictReply
from worker.rows import to_numpy
from worker.withdrawals import WatchedRequest


def answer(engine: Engine, message: PredictMessage, request: WatchedRequest) -> PredictReply | PredictFailure:
    """Encode the prompts of a request, or say which of them cannot be.

    Raises:
        CancelledError: the request was withdrawn before its prompts were on the device.
        DeadlineExceededError: nobody waits for the answer any more.
        EncoderError: the engine is closed, or the device has failed.
    """
    started = time.perf_counter()
    deadline = time.monotonic() + message.deadline - time.time()
    with tracing.within("encode", prompts=len(message.prompts)) as span:
        future = engine.submit(message.prompts, Priority.INTERACTIVE, deadline)
        request.drops(future)
        results = future.result()
        tokens = sum(result.num_tokens for result in results if isinstance(result, Encoding))
        span.set_attribute("layerstack.tokens", tokens)
        span.set_attribute("layerstack.batches_waited", future.batches_waited)
    encode_ms = (time.perf_counter() - started) * 1e3
    for result in results:
        if isinstance(result, PromptError):
            return PredictFailure(position=result.position, reason=result.reason)
    encodings = [result for result in results if isinstance(result, Encoding)]
    return PredictReply(
        fingerprint=engine.encoder.fingerprint,
        max_length=engine.encoder.config.max_length,
        own_rows=[to_numpy(encoding.own_rows) for encoding in encodings],
        encode_ms=encode_ms,
        num_tokens=np.array([encoding.num_tokens for encoding in encodings], dtype=np.int32),
        truncated=np.array([encoding.truncated for encoding in encodings], dtype=np.bool_),
    )
