"""One chunk of a job: its prompts in, its part out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from encoder import Encoder, PromptError
from jobs.parts import EncodedRow, PartHeader, PartWriter
from jobs.records import JobRecord, Prompt
from jobs.store import JobStore
from worker.errors import FingerprintMismatchError, HandedBackError
from worker.rows import encode_each, to_numpy


def encode_chunk(
    store: JobStore,
    encoder: Encoder,
    job_id: str,
    chunk: int,
    *,
    stopping: Callable[[], bool],
    on_progress: Callable[[int], None],
) -> None:
    """Write the part of a chunk, and the manifest if it was the last. Does nothing twice: a part that is there stays.

    Args:
        store: where the job is.
        encoder: whose rows are written.
        job_id: which job.
        chunk: which chunk of it.
        stopping: asked between batches.
        on_progress: told after each batch how many rows are done.

    Raises:
        JobNotFoundError: the job has been deleted.
        FingerprintMismatchError: the job was made for another encoder.
        HandedBackError: `stopping` said yes; nothing has been written.
        OSError: the storage failed.
    """
    record = store.load(job_id)
    if not store.has_part(job_id, chunk):
        if record.fingerprint != encoder.fingerprint:
            raise FingerprintMismatchError(
                f"the job was made for the encoder {record.fingerprint}, this worker runs {encoder.fingerprint} "
                f"({encoder.model})"
            )
        done = 0
        header = _header(record, encoder)
        with store.new_part(job_id, chunk) as file, PartWriter(file, header, record.compression) as part:
            for batch in _batches(store.prompts(job_id, chunk), encoder.batch_size):
                if stopping():
                    raise HandedBackError(f"chunk {chunk} of job {job_id} after {done} rows")
                for row in _encode(encoder, batch):
                    part.write(row)
                done += len(batch)
                on_progress(done)
    store.finalise(job_id)


def _encode(encoder: Encoder, batch: list[tuple[int, Prompt]]) -> Iterator[EncodedRow]:
    results = encode_each(encoder, [prompt.prompt for _, prompt in batch])
    for (index, prompt), result in zip(batch, results, strict=True):
        if isinstance(result, PromptError):
            yield EncodedRow(index, prompt.id, prompt.prompt, error=result.reason)
        else:
            yield EncodedRow(
                index, prompt.id, prompt.prompt, to_numpy(result.own_rows), result.num_tokens, result.truncated
            )


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


def _batches(prompts: Iterator[tuple[int, Prompt]], size: int) -> Iterator[list[tuple[int, Prompt]]]:
    while batch := list(islice(prompts, size)):
        yield batch
