"""Time and memory of a piece of work, and how to write their spread."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import torch


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long `work` takes, with all that it started on `device`."""
    _synchronize(device)
    started = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - started


def spread(values: Sequence[float], digits: int = 3) -> list[float]:
    """Return median, lowest and highest, to so many significant digits."""
    return [float(f"{value:.{digits}g}") for value in (statistics.median(values), min(values), max(values))]


class PeakMemory:
    """A context manager that tells how much memory was in use at the peak, more than at the beginning.

    On CUDA it is what torch allocated; on CPU the resident memory that the Linux kernel keeps count of.

    Attributes:
        peak_bytes: 0 where neither can be had.
    """

    _STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif self._RESET.exists():
            if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
                trim(0)  # what is free but still resident would count for nothing when it is used again
            self._RESET.write_text("5", encoding="ascii")  # sets the high-water mark back
            self._before = self._resident("VmRSS")
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        elif self._RESET.exists():
            self.peak_bytes = self._resident("VmHWM") - self._before

    def _resident(self, name: str) -> int:
        line = next(line for line in self._STATUS.read_text(encoding="ascii").splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
