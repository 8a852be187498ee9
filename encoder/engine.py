"""Dynamic batching: whoever wants prompts encoded submits them, and one thread fills each forward from all that wait.

    submit (any thread): tokenize -> wait
    device thread:       choose the most urgent that fit -> forward -> start the copy to host memory
    finishing thread:    await the copy -> cut it into prompts -> resolve futures

Interactive prompts go first, older before younger. A forward of theirs takes bulk prompts along only if the one before
had none: a request waits for the forward that is running, but not for its own to be filled. Bulk gets nothing while
interactive work alone keeps the device busy. While the device runs a forward, the next submissions are tokenized
and the last results are copied and cut.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Self

import torch

from encoder.batching import fill
from encoder.encoder import Encoder
from encoder.encoding import Encoding, FutureEncodings
from encoder.errors import DeadlineExceededError, DeviceFailedError, EngineClosedError, PromptError
from encoder.hostcopy import HostCopier, PendingCopy
from encoder.packing import Packing
from encoder.prompts import TokenizedPrompt
from encoder.stats import Counters, EngineStats, Priority

logger = logging.getLogger(__name__)
Results = list[Encoding | PromptError]
# Prompts that do not fit into what is left of a forward, before the search for a smaller one ends.
_PATIENCE = 64
# Forwards whose results are still being copied and cut; more would only pile up memory.
_UNFINISHED_BATCHES = 2
# Forwards that succeed at a budget that was halved, before it is doubled again.
_RECOVERY = 64


@dataclass(eq=False)
class _Submission:
    """One call of `submit`, and how far it is."""

    priority: Priority
    deadline: float | None
    results: list[Encoding | PromptError | None]
    missing: int
    batches_before: int = 0
    submitted_at: float = field(default_factory=time.monotonic)
    future: FutureEncodings = field(default_factory=FutureEncodings)
    settled: bool = False


@dataclass(eq=False)
class _Waiting:
    """One prompt that is not on the device yet."""

    submission: _Submission
    position: int
    prompt: TokenizedPrompt
    rows: int
    taken: bool = False


class Engine:
    """Batches prompts of all threads for one `Encoder`, as a context manager or until `close`.

    Thread-safe.

    Attributes:
        encoder: what it runs.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._token_budget = encoder.token_budget
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: dict[Priority, deque[_Waiting]] = {priority: deque() for priority in Priority}
        self._waiting_rows = 0
        self._counters = Counters()
        self._closing = False
        self._failure: Exception | None = None
        self._lost: Exception | None = None  # what the finishing thread met, until the device thread sees it
        self._good_forwards = 0
        self._bulk_had_turn = False
        self._probe = encoder.tokenizer([""])
        self._copier = HostCopier(encoder.device)
        self._unfinished = threading.BoundedSemaphore(_UNFINISHED_BATCHES)
        self._finishing = ThreadPoolExecutor(1, thread_name_prefix="engine-finishing")
        self._thread = threading.Thread(target=self._run, name="engine-device", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def token_budget(self) -> int:
        """Rows of a forward; smaller than the encoder's after an out-of-memory error."""
        return self._token_budget

    @property
    def waiting_rows(self) -> int:
        """Rows of all prompts that are not on the device yet: who submits much should let this fall before the next."""
        with self._changed:
            return self._waiting_rows

    @property
    def failed(self) -> bool:
        """Whether the device failed, so that only a new process helps."""
        return self._failure is not None

    def submit(
        self, prompts: Sequence[str], priority: Priority = Priority.BULK, deadline: float | None = None
    ) -> FutureEncodings:
        """Have `prompts` encoded.

        Args:
            prompts: tokenized before this returns.
            priority: interactive prompts go first.
            deadline: by the clock of `time.monotonic`; what is not on the device by then is dropped.

        Returns:
            A future of one `Encoding` or `PromptError` a prompt, in order, with own rows in host memory. Cancelling
            it drops what is not on the device yet. It fails with `DeadlineExceededError`, `EngineClosedError`, or the
            error of a device that cannot hold even one prompt.

        Raises:
            TypeError: `prompts` is one string.
            EngineClosedError: the engine is closed.
            DeviceFailedError: the device has failed.
        """
        started = time.monotonic()
        tokenized = self.encoder.tokenizer.each(prompts)
        sound = {n: prompt for n, prompt in enumerate(tokenized) if isinstance(prompt, TokenizedPrompt)}
        faults = [None if isinstance(prompt, TokenizedPrompt) else prompt for prompt in tokenized]
        submission = _Submission(priority, deadline, list(faults), len(sound), submitted_at=started)
        items = [_Waiting(submission, n, prompt, self.encoder.num_rows(prompt)) for n, prompt in sound.items()]
        with self._changed:
            if self._failure is not None:
                raise DeviceFailedError(f"the device has failed: {self._failure}") from self._failure
            if self._closing:
                raise EngineClosedError("the engine is closed")
            submission.batches_before = self._counters.started
            self._counters.tokenize_seconds += time.monotonic() - started
            self._counters.failed_prompts += len(prompts) - len(sound)
            self._waiting[priority].extend(items)
            self._waiting_rows += sum(item.rows for item in items)
            self._changed.notify()
        if not items:
            self._settle(submission)
        return submission.future

    def stats(self) -> EngineStats:
        """Return the counters."""
        with self._changed:
            return self._counters.stats(
                token_budget=self._token_budget,
                waiting_prompts={priority: len(waiting) for priority, waiting in self._waiting.items()},
                waiting_rows=self._waiting_rows,
            )

    def close(self, *, finish: bool = True) -> None:
        """Stop; may be called twice.

        Args:
            finish: encode what waits; else its futures fail with `EngineClosedError`, and only the forward that is
                running is finished.
        """
        with self._changed:
            self._closing = True
            dropped = [] if finish else self._clear()
            self._changed.notify_all()
        self._fail_all(dropped, EngineClosedError("the engine was closed before it came to this submission"))
        self._thread.join()
        self._finishing.shutdown()

    # The device thread.

    def _run(self) -> None:
        batch: list[_Waiting] = []
        try:
            while batch := self._next_batch():
                self._encode(batch)
                batch = []  # or its results would stay alive while nothing else comes
        except Exception as exc:
            logger.exception("the device has failed")
            failure = DeviceFailedError(f"the device has failed: {exc}")
            failure.__cause__ = exc
            with self._changed:
                self._failure = exc
                self._closing = True
                dropped = self._clear()
            self._fail_all([*batch, *dropped], failure)

    def _next_batch(self) -> list[_Waiting]:
        """Wait for work -> the prompts of the next forward; empty when the engine is closed and nothing waits."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lost or self._closing or any(self._waiting.values()))
                if self._lost is not None:
                    raise self._lost
                batch, dropped = self._take()
                finished = self._closing and not any(self._waiting.values())
            # Outside the lock: callbacks of futures may submit.
            self._fail_all(dropped, DeadlineExceededError("the deadline passed before its turn"))
            if batch or finished:
                return batch

    def _take(self) -> tuple[list[_Waiting], list[_Waiting]]:
        """Take the most urgent prompts that fit into a forward, and what is cancelled or too late on the way."""
        seen: list[_Waiting] = []
        dropped: list[_Waiting] = []

        def lengths() -> Iterator[int]:
            for priority, waiting in self._waiting.items():
                if priority is Priority.BULK and seen and self._bulk_had_turn:
                    return
                while waiting:
                    item = waiting.popleft()
                    self._waiting_rows -= item.rows
                    if _is_wanted(item.submission):
                        seen.append(item)
                        yield item.rows
                    else:
                        dropped.append(item)

        chosen = set(fill(lengths(), self._token_budget, _PATIENCE))
        self._put_back([item for position, item in enumerate(seen) if position not in chosen])
        self._counters.dropped_prompts += len(dropped)
        batch = [seen[position] for position in sorted(chosen)]
        if batch:
            self._bulk_had_turn = any(item.submission.priority is Priority.BULK for item in batch)
            self._note_waits(batch)
        return batch, dropped

    def _put_back(self, items: Sequence[_Waiting]) -> None:
        for item in reversed(items):
            self._waiting[item.submission.priority].appendleft(item)
            self._waiting_rows += item.rows

    def _note_waits(self, batch: Sequence[_Waiting]) -> None:
        counters, now = self._counters, time.monotonic()
        for item in batch:
            submission, waited = item.submission, counters.batches_waited
            if not item.taken:  # else it is tried again
                item.taken = True
                forwards = counters.started - submission.batches_before
                waited[submission.priority] = max(waited[submission.priority], forwards)
                submission.future.batches_waited = max(submission.future.batches_waited, forwards)
                counters.queue_seconds += now - submission.submitted_at
        counters.started += 1

    def _encode(self, batch: Sequence[_Waiting]) -> None:
        """Run a forward over `batch`; a fault that one prompt has is narrowed down to it by halves.

        Raises:
            torch.AcceleratorError: the device is in a state that only a new process gets it out of.
        """
        started = time.monotonic()
        prompts = [item.prompt for item in batch]
        self._unfinished.acquire()
        try:
            packing, rows = self.encoder.forward(prompts)
            copy = self._copier.start(rows)
        except Exception as exc:
            self._unfinished.release()
            if isinstance(exc, torch.AcceleratorError):
                raise
            fault = exc.with_traceback(None)  # whose frames would keep the forward's tensors alive
        else:
            self._finishing.submit(self._finish, batch, packing, copy)
            self._count(batch, time.monotonic() - started)
            return
        if _is_out_of_memory(fault):
            self._shrink(batch, fault)
        elif len(batch) == 1:
            self._fail_prompt(batch[0], fault)
        else:
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                self._encode(half)

    def _count(self, batch: Sequence[_Waiting], encode_seconds: float) -> None:
        rows = sum(item.rows for item in batch)
        with self._changed:
            counters = self._counters
            counters.batches += 1
            counters.prompts += len(batch)
            counters.rows += rows
            counters.capacity += self._token_budget
            counters.encode_seconds += encode_seconds
            self._good_forwards += 1
            if self._good_forwards >= _RECOVERY and self._token_budget < self.encoder.token_budget:
                self._token_budget = min(self.encoder.token_budget, 2 * self._token_budget)
                self._good_forwards = 0

    def _shrink(self, batch: Sequence[_Waiting], fault: Exception) -> None:
        """Halve the budget after running out of memory, and put `batch` back in front."""
        if self.encoder.device.type == "cuda":
            torch.cuda.empty_cache()
        rows = sum(item.rows for item in batch)
        with self._changed:
            self._counters.out_of_memory += 1
            self._good_forwards = 0
            if len(batch) > 1:
                self._token_budget = max(1, min(self._token_budget, rows) // 2)
                self._put_back(batch)
        if len(batch) == 1:
            logger.error("out of memory with a single prompt of %d rows", rows)
            self._fail_all(batch, fault)
            return
        logger.warning("out of memory in a forward of %d rows; the token budget is now %d", rows, self._token_budget)

    def _fail_prompt(self, item: _Waiting, fault: Exception) -> None:
        """Blame the prompt, unless a sound one fails as well.

        Raises:
            Exception: what the sound one fails with: the fault is not the prompt's, and no prompt must be given up.
        """
        self.encoder.forward(self._probe)
        logger.error("a prompt of %d rows cannot be encoded", item.rows, exc_info=fault)
        with self._changed:
            self._counters.failed_prompts += 1
        self._deliver(item, PromptError(item.position, f"{type(fault).__name__}: {fault}"))

    # The finishing thread, and the delivery that both threads do.

    def _finish(self, batch: Sequence[_Waiting], packing: Packing, copy: PendingCopy) -> None:
        try:
            own_rows = packing.split(copy.wait())
            encodings = self.encoder.encodings([item.prompt for item in batch], own_rows)
            for item, encoding in zip(batch, encodings, strict=True):
                self._deliver(item, encoding)
        except Exception as exc:
            logger.exception("the results of a forward are lost")
            if isinstance(exc, torch.AcceleratorError):
                with self._changed:
                    self._lost = exc
                    self._changed.notify()
            self._fail_all(batch, exc)
        finally:
            self._unfinished.release()

    def _deliver(self, item: _Waiting, result: Encoding | PromptError) -> None:
        submission = item.submission
        with self._changed:
            submission.results[item.position] = result
            submission.missing -= 1
            complete = submission.missing == 0
        if complete:
            self._settle(submission)

    def _clear(self) -> list[_Waiting]:
        """Empty the queue -> what was in it; the caller holds the lock."""
        items = [item for waiting in self._waiting.values() for item in waiting]
        for waiting in self._waiting.values():
            waiting.clear()
        self._waiting_rows = 0
        self._counters.dropped_prompts += len(items)
        return items

    def _fail_all(self, items: Iterable[_Waiting], error: Exception) -> None:
        for item in items:
            self._settle(item.submission, error)

    def _settle(self, submission: _Submission, error: Exception | None = None) -> None:
        """Resolve a future once, with its results or with `error`, unless it is cancelled."""
        with self._changed:
            if submission.settled:
                return
            submission.settled = True
        if not submission.future.set_running_or_notify_cancel():
            return
        if error is not None:
            submission.future.set_exception(error)
        else:
            submission.future.set_result([result for result in submission.results if result is not None])


def _is_wanted(submission: _Submission) -> bool:
    late = submission.deadline is not None and time.monotonic() > submission.deadline
    return not (late or submission.settled or submission.future.cancelled())


def _is_out_of_memory(error: Exception) -> bool:
    # Neither the CPU's allocator nor cuBLAS has an error class for it.
    says_so = any(words in str(error) for words in ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED"))
    return says_so or isinstance(error, torch.OutOfMemoryError | MemoryError)
