"""Encodes no prompt of a job twice: remembers what is being encoded, and the rows that were encoded last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from encoder import Encoding, Engine, PromptError
from jobs.tensors import Array
from worker.rows import to_numpy

Results = list[Encoding | PromptError]


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """Own rows `[n, D]` of a prompt, or the reason why there are none."""

    own_rows: Array | None = None
    num_tokens: int | None = None
    truncated: bool | None = None
    error: str | None = None

    @property
    def num_rows(self) -> int:
        """What it takes of the memory for rows; one row if there are none."""
        return 1 if self.own_rows is None else max(1, len(self.own_rows))


@dataclass(frozen=True, eq=False)
class PendingPrompt:
    """A prompt on its way through the engine: one of those that a future is for."""

    future: Future[Results]
    position: int

    def result(self) -> EncodedPrompt:
        """Return its rows, as part of the memory of its whole batch."""
        result = self.future.result()[self.position]
        if isinstance(result, PromptError):
            return EncodedPrompt(error=result.reason)
        return EncodedPrompt(to_numpy(result.own_rows), result.num_tokens, result.truncated)


_Key = tuple[str, str]
"""Job and prompt."""


class Recall:
    """Submits prompts to an engine, but none whose rows for the same job are remembered or under way. Thread-safe.

    Args:
        engine: encodes what is not known.
        max_rows: that are remembered; those that were used longest ago are forgotten first.
    """

    def __init__(self, engine: Engine, max_rows: int) -> None:
        self._engine = engine
        self._max_rows = max_rows
        self._guard = threading.Lock()
        self._under_way: dict[_Key, PendingPrompt] = {}
        self._remembered: OrderedDict[_Key, EncodedPrompt] = OrderedDict()
        self._rows = 0

    def submit(
        self, job_id: str, prompts: Sequence[str]
    ) -> tuple[list[PendingPrompt | EncodedPrompt], Future[Results]]:
        """Have `prompts` of a job encoded, those that are not known.

        Returns:
            One entry a prompt, and the future of those that were submitted, be there any or not.

        Raises:
            EncoderError: the engine is closed, or the device has failed.
        """
        keys = [(job_id, prompt) for prompt in prompts]
        with self._guard:
            unknown = [
                key for key in dict.fromkeys(keys) if key not in self._remembered and not self._is_under_way(key)
            ]
            future = self._engine.submit([prompt for _, prompt in unknown])
            self._under_way |= {key: PendingPrompt(future, position) for position, key in enumerate(unknown)}
            for key in keys:
                if key in self._remembered:
                    self._remembered.move_to_end(key)
            return [self._remembered.get(key) or self._under_way[key] for key in keys], future

    def remember(self, job_id: str, prompt: str, encoded: EncodedPrompt) -> None:
        """Keep what came out for a prompt, as a copy: it may be part of a large batch."""
        key = (job_id, prompt)
        with self._guard:
            self._under_way.pop(key, None)
            if key in self._remembered:
                return
            if encoded.own_rows is not None:
                rows = encoded.own_rows.copy()
                encoded = EncodedPrompt(rows, encoded.num_tokens, encoded.truncated)
            self._remembered[key] = encoded
            self._rows += encoded.num_rows
            while self._rows > self._max_rows:
                _, oldest = self._remembered.popitem(last=False)
                self._rows -= oldest.num_rows

    def forget(self, job_id: str, prompts: Sequence[str], future: Future[Results]) -> None:
        """Take back what will not be encoded: `future` is cancelled, or has failed."""
        with self._guard:
            for key in [(job_id, prompt) for prompt in prompts]:
                if key in self._under_way and self._under_way[key].future is future:
                    del self._under_way[key]

    def _is_under_way(self, key: _Key) -> bool:
        pending = self._under_way.get(key)
        return pending is not None and not pending.future.cancelled()
