"""One chunk of a job: its prompts in, its part out."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from encoder import DeviceFailedError, Encoder, Engine, EngineClosedError
from jobs.errors import PartFormatError, StorageFullError
from jobs.parts import EncodedRow, PartHeader, PartWriter
from jobs.records import JobRecord, PartReport, Prompt, RowError
from jobs.results import DigestingFile, inspect_part
from jobs.store import JobStore
from worker.errors import DeviceLostError, FingerprintMismatchError, HandedBackError, PromptFailedError
from worker.metrics import Written
from worker.recall import EncodedPrompt, PendingPrompt, Recall, Results
from worker.rows import to_numpy

_Indexed = tuple[int, Prompt]
_Encoded = tuple[_Indexed, EncodedPrompt]
# Prompts of one submission: small, so that progress is told and a stop is seen often. The engine puts many together.
_SUBMISSION = 8
# Forwards' worth of rows that may wait in the engine: one would be gone before the next submission is tokenized.
_FORWARDS_AHEAD = 2
_STOP_POLL_S = 0.1


class Watch(Protocol):
    """Looks after a chunk while it is worked on."""

    def check(self) -> None:
        """Find out whether to go on.

        Raises:
            ChunkStoppedError: no.
        """

    def progress(self, rows: int) -> None:
        """Hear how many rows are encoded."""


@dataclass(frozen=True)
class ChunkEncoder:
    """Encodes chunks.

    Attributes:
        store: where the jobs are.
        engine: whose rows are written.
        recall: remembers rows of prompts that may come again.
        reserve_bytes: of the storage, to be left free.
        written: counts the parts that it writes, not those that it finds.
    """

    store: JobStore
    engine: Engine
    recall: Recall
    reserve_bytes: int = 0
    written: Written = field(default_factory=Written)

    def encode(self, job_id: str, chunk: int, watch: Watch) -> None:
        """Write the part of a chunk, unless there is one.

        Raises:
            JobNotFoundError: the job has been deleted.
            FingerprintMismatchError: the job was made for another encoder.
            PromptFailedError: a prompt failed on its own, of a job with `on_error` "fail"; nothing has been written.
            ChunkStoppedError: `watch` said so, or the engine is closed; nothing has been written.
            DeviceLostError: the device failed while prompts of the chunk were waiting for it or on it.
            StorageError: the storage failed.
        """
        store, encoder = self.store, self.engine.encoder
        record = store.load(job_id)
        watch.check()
        if store.has_part(job_id, chunk):
            return
        if record.fingerprint != encoder.fingerprint:
            raise FingerprintMismatchError(
                f"the job was made for the encoder {record.fingerprint}, this worker runs {encoder.fingerprint} "
                f"({encoder.model})"
            )
        store.begin(job_id)
        report, is_ours = self._found(job_id, chunk, watch), False
        if report is None:
            self._check_space(record)
            report, is_ours = self._write(record, chunk, watch)
        store.count_part(job_id, report)
        if is_ours:
            self.written.add(report.part)

    def _found(self, job_id: str, chunk: int, watch: Watch) -> PartReport | None:
        """Check a part that somebody wrote who died before it counted."""
        try:
            return inspect_part(self.store, job_id, chunk)
        except FileNotFoundError:
            return None
        except PartFormatError:
            watch.check()  # if this process slept meanwhile, somebody else may have written a good one
            if not self.store.has_part(job_id, chunk):
                self.store.discard_part(job_id, chunk)
            return None

    def _check_space(self, record: JobRecord) -> None:
        free, needed = self.store.storage.free_bytes(), record.estimated_bytes // record.num_chunks
        if free is not None and free < needed + self.reserve_bytes:
            raise StorageFullError(
                f"the storage has {free} bytes left, the next part takes about {needed}, "
                f"and {self.reserve_bytes} are to stay free (LAYERSTACK_STORAGE_RESERVE_BYTES)"
            )

    def _write(self, record: JobRecord, chunk: int, watch: Watch) -> tuple[PartReport, bool]:
        """Encode a chunk -> what is in its part, and whether the part is ours: another worker may be faster."""
        header = _header(record, self.engine.encoder)
        prompts = self.store.prompts(record.id, chunk)
        try:
            # What waits for the engine is dropped at once, not when whoever handles the fault lets go of it.
            with closing(self._encoded(record, prompts, watch)) as rows, self.store.new_part(record.id, chunk) as file:
                digesting, done = DigestingFile(file), 0
                with PartWriter(digesting, header, record.compression) as part:
                    for (index, prompt), encoded in rows:
                        part.write(_row(index, prompt, encoded))
                        if record.on_error == "fail" and part.counts.errors:
                            raise _failed(part.counts.errors[0])
                        done += 1
                        watch.progress(done)
                watch.check()
        except FileExistsError:
            return inspect_part(self.store, record.id, chunk), False
        return part.counts.report(chunk, digesting.size, digesting.sha256), True

    def _encoded(self, record: JobRecord, prompts: Iterator[_Indexed], watch: Watch) -> Generator[_Encoded]:
        """Yield prompts with their rows, in order, keeping the engine busy with those that follow."""
        engine, pending = self.engine, deque[_Submission]()
        try:
            while batch := list(islice(prompts, _SUBMISSION)):
                # What is done is written first, or it would pile up whenever the storage is slower than the encoder.
                while pending and (pending[0].done or engine.waiting_rows > _FORWARDS_AHEAD * engine.token_budget):
                    yield from self._results(record, pending[0], watch)
                    pending.popleft()
                watch.check()
                pending.append(self._submit(record, batch))
            while pending:
                yield from self._results(record, pending[0], watch)
                pending.popleft()
        except DeviceFailedError as exc:
            raise (DeviceLostError if pending else HandedBackError)(str(exc)) from exc
        except EngineClosedError as exc:
            raise HandedBackError(str(exc)) from exc
        finally:
            for submission in pending:
                submission.future.cancel()
                self.recall.forget(record.id, submission.prompts, submission.future)

    def _submit(self, record: JobRecord, batch: list[_Indexed]) -> _Submission:
        prompts = [prompt.prompt for _, prompt in batch]
        if record.deduplicate:
            return _Submission(batch, prompts, *self.recall.submit(record.id, prompts))
        future = self.engine.submit(prompts)
        return _Submission(batch, prompts, [PendingPrompt(future, n) for n in range(len(prompts))], future)

    def _results(self, record: JobRecord, submission: _Submission, watch: Watch) -> Iterator[_Encoded]:
        for (index, prompt), entry in zip(submission.batch, submission.entries, strict=True):
            encoded = entry if isinstance(entry, EncodedPrompt) else self._await(record, prompt.prompt, entry, watch)
            yield (index, prompt), encoded

    def _await(self, record: JobRecord, prompt: str, pending: PendingPrompt, watch: Watch) -> EncodedPrompt:
        while True:
            while not pending.future.done():
                watch.check()
                wait([pending.future], timeout=_STOP_POLL_S)
            try:
                encoded = pending.result()
            except CancelledError:  # by another chunk, which had it submitted and has been put down
                return self._again(record, prompt, watch)
            # A job that fails of it begins the prompt anew when it is retried.
            if record.deduplicate and (encoded.error is None or record.on_error == "continue"):
                self.recall.remember(record.id, prompt, encoded)
            return encoded

    def _again(self, record: JobRecord, prompt: str, watch: Watch) -> EncodedPrompt:
        """Have one prompt encoded, whose future was another chunk's."""
        (entry,), future = self.recall.submit(record.id, [prompt])
        try:
            return entry if isinstance(entry, EncodedPrompt) else self._await(record, prompt, entry, watch)
        finally:
            future.cancel()  # has no effect if it is done
            self.recall.forget(record.id, [prompt], future)


@dataclass(frozen=True, eq=False)
class _Submission:
    """A few prompts of a chunk, and what came or will come out for each; `future` is of those that were not known."""

    batch: list[_Indexed]
    prompts: list[str]
    entries: list[PendingPrompt | EncodedPrompt]
    future: Future[Results]

    @property
    def done(self) -> bool:
        return all(isinstance(entry, EncodedPrompt) or entry.future.done() for entry in self.entries)


def _failed(row: RowError) -> PromptFailedError:
    return PromptFailedError(f"prompt {row.index} (id {row.id!r}) failed: {row.error}")


def _row(index: int, prompt: Prompt, encoded: EncodedPrompt) -> EncodedRow:
    return EncodedRow(
        index, prompt.id, prompt.prompt, encoded.own_rows, encoded.num_tokens, encoded.truncated, encoded.error
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
