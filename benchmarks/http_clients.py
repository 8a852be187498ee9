"""Starts `benchmarks/http_load.py` in a process of its own, and makes figures of what its clients have seen."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.measure import Cores

_ROOT = Path(__file__).parents[1]
_PERCENTILES = (50, 95, 99)
# What has been sent when the measured time is over is waited for, so that its share of that time can be counted.
_DRAIN_S = 120.0


class Request(NamedTuple):
    """One request, as `benchmarks/http_load.py` prints it; times are of one clock."""

    sent_s: float
    done_s: float
    status: int
    size: int
    encode_ms: float | None

    @property
    def latency_ms(self) -> float:
        """From sending it to the last byte of the answer."""
        return 1e3 * (self.done_s - self.sent_s)


@dataclass(frozen=True)
class Load:
    """What so many clients have seen.

    Attributes:
        clients: each has one request under way all the time.
        begun_s: when the measured time began.
        ended_s: when it ended.
        drained: whether the clients waited for the answers that were under way then.
        requests: in the order in which they ended, with those of the warm-up and of the end.
        cores: processors that each process kept busy in the measured time; `clients` is the load itself.
    """

    clients: int
    begun_s: float
    ended_s: float
    drained: bool
    requests: list[Request]
    cores: dict[str, float]

    @property
    def answers(self) -> list[Request]:
        """Those that came in the measured time."""
        return [each for each in self._measured if each.status == HTTPStatus.OK]

    @property
    def prompts_per_s(self) -> float:
        """Answers a second.

        The answers of a forward come together, so many of them may just have come, or be just about to, when the
        measured time begins or ends. So each counts by the part of its latency that lies in it.
        """
        if not self.drained:
            return len(self.answers) / (self.ended_s - self.begun_s)
        answers = [each for each in self.requests if each.status == HTTPStatus.OK]
        parts = [
            max(0.0, min(each.done_s, self.ended_s) - max(each.sent_s, self.begun_s)) / (each.done_s - each.sent_s)
            for each in answers
        ]
        return sum(parts) / (self.ended_s - self.begun_s)

    def report(self) -> dict[str, Any]:
        """Return the figures; latencies only if there were enough answers for them to be those of any client."""
        answers = self.answers
        report: dict[str, Any] = {
            "clients": self.clients,
            "seconds": round(self.ended_s - self.begun_s, 1),
            "answers": len(answers),
            "statuses": dict(Counter(str(each.status) for each in self._measured)),
            "prompts_per_s": _short(self.prompts_per_s),
        }
        if answers and len(answers) >= self.clients:
            report |= {
                "latency_ms": _percentiles([each.latency_ms for each in answers]),
                "answer_mb": round(statistics.mean(each.size for each in answers) / 1e6, 3),
            }
            if told := [(each, each.encode_ms) for each in answers if each.encode_ms is not None]:
                report |= {
                    "encode_ms": _percentiles([encode_ms for _, encode_ms in told]),
                    "over_encode_ms": _percentiles([each.latency_ms - encode_ms for each, encode_ms in told]),
                }
        return report | {"cpu_cores": {name: round(value, 3) for name, value in self.cores.items()}}

    @property
    def _measured(self) -> list[Request]:
        return [each for each in self.requests if self.begun_s < each.done_s <= self.ended_s]


def run_load(
    url: str,
    prompts: Path,
    clients: int,
    processes: Mapping[str, psutil.Process],
    *,
    query: str = "",
    warm_up: int,
    seconds: float,
    wanted: int | None = None,
) -> Load:
    """Let `clients` clients ask for one prompt after the other.

    Args:
        url: of the server.
        prompts: a JSON file with the list of prompts.
        clients: how many.
        processes: of the server, by name.
        query: of POST /predict.
        warm_up: answers before the measured time begins.
        seconds: the measured time, unless `wanted` answers come before.
        wanted: answers; then those that are still under way are not waited for.

    Raises:
        SystemExit: the clients' process failed.
    """
    command = [sys.executable, "-m", "benchmarks.http_load", "--url", url, f"--query={query}"]
    command += ["--prompts", str(prompts), "--clients", str(clients), "--warm-up", str(warm_up)]
    command += ["--seconds", str(seconds)]
    command += ["--drain", str(_DRAIN_S)] if wanted is None else ["--requests", str(wanted)]
    with subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own command, with no shell
        try:
            _next(process, "begun")
            cores = Cores({**processes, "clients": psutil.Process(process.pid)})
            _next(process, "ended")
            used = cores.used()
            results = _next(process, "results")
        finally:
            process.kill()
    requests = [Request(*each) for each in results["requests"]]
    return Load(clients, results["begun"], results["ended"], wanted is None, requests, used)


def _next(process: subprocess.Popen[str], event: str) -> dict[str, Any]:
    """Wait for the line that tells of `event`."""
    line = process.stdout.readline() if process.stdout else ""
    told = json.loads(line) if line else {}
    if told.get("event") != event:
        raise SystemExit(f"the clients ended without telling of {event!r}")
    return dict(told)


def _percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return {f"p{each}": _short(cuts[each - 1]) for each in _PERCENTILES} | {"max": _short(max(values))}


def _short(value: float) -> float:
    return float(f"{value:.4g}")
