"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum


class Priority(IntEnum):
    """Who goes first."""

    INTERACTIVE = 0
    BULK = 1


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and what waits now.

    Attributes:
        token_budget: rows of a forward; for a while smaller after an out-of-memory error.
        waiting_prompts: by priority, those that are not on the device yet.
        waiting_rows: rows of all of them.
        batches: forwards that succeeded.
        prompts: that went through a forward.
        rows: that went through a forward.
        capacity: rows that the forwards had room for.
        fill: rows as a share of what the forwards had room for, 0 to 1; more if one prompt is longer than the budget.
        tokenize_seconds: spent in submitting threads.
        queue_seconds: sum over prompts, from the call of `submit`, tokenizing included, to the start of their forward.
        encode_seconds: sum over forwards.
        batches_waited: by priority, the most forwards that started between a prompt's submission and its own forward.
        out_of_memory: forwards that ran out of memory; they are halved and tried again.
        failed_prompts: that failed on their own.
        dropped_prompts: cancelled, expired or handed back before they reached the device.
    """

    token_budget: int
    waiting_prompts: dict[Priority, int]
    waiting_rows: int
    batches: int
    prompts: int
    rows: int
    capacity: int
    fill: float
    tokenize_seconds: float
    queue_seconds: float
    encode_seconds: float
    batches_waited: dict[Priority, int]
    out_of_memory: int
    failed_prompts: int
    dropped_prompts: int


@dataclass
class Counters:
    """What `EngineStats` is made from; changed under the engine's lock."""

    started: int = 0
    batches: int = 0
    prompts: int = 0
    rows: int = 0
    capacity: int = 0
    tokenize_seconds: float = 0.0
    queue_seconds: float = 0.0
    encode_seconds: float = 0.0
    out_of_memory: int = 0
    failed_prompts: int = 0
    dropped_prompts: int = 0
    batches_waited: dict[Priority, int] = field(default_factory=lambda: dict.fromkeys(Priority, 0))

    def stats(self, *, token_budget: int, waiting_prompts: dict[Priority, int], waiting_rows: int) -> EngineStats:
        """Return what has been counted, with what waits now."""
        return EngineStats(
            token_budget=token_budget,
            waiting_prompts=waiting_prompts,
            waiting_rows=waiting_rows,
            batches=self.batches,
            prompts=self.prompts,
            rows=self.rows,
            capacity=self.capacity,
            fill=self.rows / self.capacity if self.capacity else 0.0,
            tokenize_seconds=self.tokenize_seconds,
            queue_seconds=self.queue_seconds,
            encode_seconds=self.encode_seconds,
            batches_waited=dict(self.batches_waited),
            out_of_memory=self.out_of_memory,
            failed_prompts=self.failed_prompts,
            dropped_prompts=self.dropped_prompts,
        )
