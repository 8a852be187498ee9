"""One chunk of a job: its prompts in, its part out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from itertools import islice

from encoder import Encoder, Encoding, Engine, PromptError
from jobs.parts import EncodedRow, PartHeader, PartWriter
from jobs.records import JobRecord, Prompt
from jobs.store import JobStore
from worker.errors import FingerprintMismatchError, HandedBackError
from worker.rows import to_numpy

_Results = list[Encoding | PromptError]
# Prompts of one submission: small, so that progress is told and a stop is seen often. The engine puts many together.
_SUBMISSION = 8
# Forwards' worth of rows that may wait in the engine: one would be gone before the next submission is tokenized.
_FORWARDS_AHEAD = 2
_STOP_POLL_S = 0.1


def encode_chunk(
    store: JobStore,
    engine: Engine,
    job_id: str,
    chunk: int,
    *,
    stopping: Callable[[], bool],
    on_progress: Callable[[int], None],
) -> None:
    """Write the part of a chunk, and the manifest if it was the last. Does nothing twice: a part that is there stays.

    Args:
        store: where the job is.
        engine: whose rows are written.
        job_id: which job.
        chunk: which chunk of it.
        stopping: asked while rows are awaited.
        on_progress: told every few rows how many are done.

    Raises:
        JobNotFoundError: the job has been deleted.
        FingerprintMismatchError: the job was made for another encoder.
        HandedBackError: `stopping` said yes; nothing has been written.
        OSError: the storage failed.
    """
    record = store.load(job_id)
    encoder = engine.encoder
    if not store.has_part(job_id, chunk):
        if record.fingerprint != encoder.fingerprint:
            raise FingerprintMismatchError(
                f"the job was made for the encoder {record.fingerprint}, this worker runs {encoder.fingerprint} "
                f"({encoder.model})"
            )
        done = 0
        header = _header(record, encoder)
        with store.new_part(job_id, chunk) as file, PartWriter(file, header, record.compression) as part:
            for batch, results in _encode(engine, store.prompts(job_id, chunk), stopping):
                for (index, prompt), result in zip(batch, results, strict=True):
                    part.write(_row(index, prompt, result))
                done += len(batch)
                on_progress(done)
    store.finalise(job_id)


def _encode(
    engine: Engine, prompts: Iterator[tuple[int, Prompt]], stopping: Callable[[], bool]
) -> Iterator[tuple[list[tuple[int, Prompt]], _Results]]:
    """Yield prompts with their results, in order, keeping the engine busy with those that follow."""
    pending: deque[tuple[list[tuple[int, Prompt]], Future[_Results]]] = deque()
    try:
        while batch := list(islice(prompts, _SUBMISSION)):
            # What is done is written first, or it would pile up whenever the storage is slower than the encoder.
            while pending and (pending[0][1].done() or engine.waiting_rows > _FORWARDS_AHEAD * engine.token_budget):
                yield pending[0][0], _await(pending[0][1], stopping)
                pending.popleft()
            if stopping():
                raise HandedBackError("the worker is stopping")
            pending.append((batch, engine.submit([prompt.prompt for _, prompt in batch])))
        while pending:
            yield pending[0][0], _await(pending[0][1], stopping)
            pending.popleft()
    finally:
        for _, future in pending:
            future.cancel()


def _await(future: Future[_Results], stopping: Callable[[], bool]) -> _Results:
    while not future.done():
        if stopping():
            raise HandedBackError("the worker is stopping")
        wait([future], timeout=_STOP_POLL_S)
    return future.result()


def _row(index: int, prompt: Prompt, result: Encoding | PromptError) -> EncodedRow:
    if isinstance(result, PromptError):
        return EncodedRow(index, prompt.id, prompt.prompt, error=result.reason)
    own_rows = to_numpy(result.own_rows)
    return EncodedRow(index, prompt.id, prompt.prompt, own_rows, result.num_tokens, result.truncated)


def _header(record: JobRecord, encoder: Encoder) -> PartHeader:
    return PartHeader.build(
        layout=record.layout,
        dtype=record.dtype,
        max_length=encoder.config.max_length,
        fingerprint=encoder.fingerprint,
        layers=encoder.config.layers,
        prefix_rows=to_numpy(encoder.prefix_rows),
        pad_row=to_numpy(encoder.pad_row),
    )
