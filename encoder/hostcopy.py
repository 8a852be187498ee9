"""From the device to host memory while the device goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_CUDA: Any = torch.cuda  # its streams and events carry no annotations


@dataclass(frozen=True, eq=False)
class PendingCopy:
    """Rows on their way to host memory.

    Attributes:
        rows: `[M, D]` in host memory, complete once `done` has happened.
        done: None if it already has.
    """

    rows: torch.Tensor
    done: torch.cuda.Event | None

    def wait(self) -> torch.Tensor:
        """Return the rows when they are there."""
        if self.done is not None:
            self.done.synchronize()
        return self.rows


class HostCopier:
    """Copies rows into pinned host memory on a stream of its own, so that the next forward need not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _CUDA.Stream(device) if device.type == "cuda" else None

    def start(self, rows: torch.Tensor) -> PendingCopy:
        """Wait until `rows` are computed, and start their copy.

        Raises:
            torch.AcceleratorError: computing them failed.
        """
        if self._stream is None:
            return PendingCopy(rows.cpu(), None)
        # Sleeps rather than spins. Not to run ahead of the device keeps it free for whoever comes next.
        computed = _CUDA.Event(blocking=True)
        computed.record(torch.cuda.current_stream(rows.device))
        computed.synchronize()
        copied = _CUDA.Event(blocking=True)
        with torch.cuda.stream(self._stream):
            host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            host.copy_(rows, non_blocking=True)
            copied.record(self._stream)
        rows.record_stream(self._stream)  # or the allocator could give their memory to the next forward too early
        return PendingCopy(host, copied)
