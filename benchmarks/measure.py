"""Time and memory of a piece of work, and how to write their spread."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import psutil
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

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif _can_reset():
            if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
                trim(0)  # what is free but still resident would count for nothing when it is used again
            reset_peak()
            self._before = resident_bytes()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        elif _can_reset():
            self.peak_bytes = peak_resident_bytes() - self._before


def resident_bytes(pid: int | str = "self") -> int:
    """Return the resident memory of a process; 0 where the kernel is not Linux."""
    return _status(pid, "VmRSS")


def peak_resident_bytes(pid: int | str = "self") -> int:
    """Return its highest resident memory, since `reset_peak` if that was called."""
    return _status(pid, "VmHWM")


def reset_peak(pid: int | str = "self") -> None:
    """Set the high-water mark of a process of the same user back to what is resident now."""
    if _can_reset():
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


class Cores:
    """How many processors are busy from here on: in each of `processes`, in this one (`benchmark`), and in others."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self._processes = processes | {"benchmark": psutil.Process()}
        self._before = self._cpu_seconds()
        self._started = time.perf_counter()

    def used(self) -> dict[str, float]:
        """Return processor seconds per second since the beginning."""
        elapsed = time.perf_counter() - self._started
        spent = {name: now - self._before[name] for name, now in self._cpu_seconds().items()}
        return {name: max(0.0, each) / elapsed for name, each in spent.items()}  # clock ticks are coarse

    def _cpu_seconds(self) -> dict[str, float]:
        machine = psutil.cpu_times()
        times = {name: process.cpu_times() for name, process in self._processes.items()}
        found = {name: each.user + each.system for name, each in times.items()}
        return found | {"others": machine.user + machine.nice + machine.system - sum(found.values())}


def _can_reset() -> bool:
    return Path("/proc/self/clear_refs").exists()


def _status(pid: int | str, name: str) -> int:
    path = Path(f"/proc/{pid}/status")
    if not path.exists():
        return 0
    line = next(line for line in path.read_text(encoding="ascii").splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
