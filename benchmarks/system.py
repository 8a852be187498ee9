"""The whole stack against the bare encoder: the same prompts over HTTP to Parquet, and straight through the model.

    python -m benchmarks.system --prompts FILE [--limit 64] [--hidden 768] [--rounds 3] [--storage DIR] [--json]

`layerstack up` runs as a child process, with the bare encoder's checkpoint, dtype, token budget and number of torch
threads. Every round times first the bare encoder, while the stack is idle, then a job of the same prompts, while the
bare encoder is idle: a slow moment of the machine meets both, and each has the whole machine. Lists are the median over
the rounds, the lowest and the highest. What neither is, but takes processor time, is counted as `others`: figures with
more than a few hundredths of it are not worth much.

- Tokens are own rows: what a prompt adds behind the system message. The system message's rows, which are constants,
  and padding do not count.
- The bare encoder is `Encoder.forward` over prompts packed longest first, in a thread of its own as in the worker.
- A job's time is from sending POST /jobs to its `finished_at`, or to the last look that found it unfinished if that is
  later. It is asked for rarely, since looking costs the stack time.
- No prompt comes twice, so the stack, which remembers the rows of a job, encodes as many as the bare encoder.

Then one prompt at a time goes to POST /predict, after random pauses of up to a batch, until its last byte is here:
first on the idle stack, then while jobs keep the worker busy. For comparison: the same prompts one at a time through
the bare encoder, and between the requests a batch, which is one forward over as many prompts as the engine puts
together; on CPU also with OpenMP's threads spinning while they wait for each other, which neither does (see `Bare`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Self, cast

import httpx
import psutil
import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.encoder import sample
from benchmarks.measure import Cores, peak_resident_bytes, reset_peak, resident_bytes, seconds, spread
from encoder import Encoder, tiny
from encoder.batching import fill, plan
from encoder.prompts import TokenizedPrompt

_ROOT = Path(__file__).parents[1]
START_S = 600.0
STOP_S = 30.0
POLL_S = 0.5
# A section begins when what the one before left behind, such as files to close, is done.
SETTLE_S = 1.0
WARM_UP = 8
SPINNING_REPEATS = 3
# How much a job has that keeps the worker busy, and how much must be left of it when a request is sent. A request waits
# for one batch and is part of the next.
BATCHES_PER_JOB, BATCHES_LEFT = 32, 12
# Of a prompt set, when a batch is filled: prompts that do not fit before the search for a smaller one ends.
PATIENCE = 64


@dataclass(frozen=True)
class Job:
    """A finished job: its time from sending the request to the manifest, that to the 202, and `Cores` meanwhile."""

    seconds: float
    accept_s: float
    manifest: dict[str, Any]
    cores: dict[str, float]


@dataclass(frozen=True)
class Round:
    """One turn of both."""

    bare_s: float
    bare_cores: dict[str, float]
    job: Job


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.system", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=Path, required=True, help="one prompt a line")
    parser.add_argument("--limit", type=int, default=64, help="prompts in a round, a random sample (default 64)")
    parser.add_argument("--hidden", type=int, default=768, help="hidden size of the small checkpoint (default 768)")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--requests", type=int, default=20, help="to /predict, idle and busy (default 20)")
    parser.add_argument("--storage", type=Path, help="existing folder to make the stack's own folder in, for its time")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument("--dtype", help="default bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--token-budget", type=int, help="rows of a forward; default the encoder's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # or the stack would outlive this process
    disable_progress_bar()
    prompts = list(dict.fromkeys(sample(args.prompts, args.limit, fill=False)))
    with tempfile.TemporaryDirectory(prefix="layerstack-benchmark-", dir=args.storage) as folder:
        checkpoint = Path(folder) / "checkpoint"
        tiny.write(checkpoint, hidden=args.hidden)
        encoder = Encoder.load(checkpoint, device=args.device, dtype=args.dtype, token_budget=args.token_budget)
        with Stack(Path(folder), checkpoint, encoder) as stack:
            bare = Bare(encoder)
            report = {
                "prompts_file": args.prompts.name,
                "hidden_size": args.hidden,
                **measure_throughput(bare, stack, prompts, args.rounds),
                **measure_latency(bare, stack, prompts, args.requests),
                **stack.memory_report(),
            }
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        for name, value in report.items():
            print(f"{name:32} {'{:g} ({:g} to {:g})'.format(*value) if isinstance(value, list) else value}")


def measure_throughput(bare: Bare, stack: Stack, prompts: list[str], num_rounds: int) -> dict[str, Any]:
    """Time both on `prompts`, in turn."""
    encoder = bare.encoder
    bare.encode_s(prompts[:WARM_UP])
    stack.run(prompts[:WARM_UP])
    rounds = []
    for _ in range(num_rounds):
        time.sleep(SETTLE_S)
        cores = Cores(stack.processes)
        bare_s = bare.encode_s(prompts)
        bare_cores = cores.used()
        time.sleep(SETTLE_S)
        rounds.append(Round(bare_s, bare_cores, stack.run(prompts)))
    tokenized = encoder.tokenizer(prompts)
    own_tokens = sum(encoder.num_rows(prompt) for prompt in tokenized)
    jobs = [each.job for each in rounds]
    if (counted := jobs[0].manifest["tokens"]) != (expected := sum(prompt.num_tokens for prompt in tokenized)):
        raise SystemExit(f"the job's manifest counts {counted} tokens, the bare encoder {expected}")
    return {
        "device": torch.cuda.get_device_name(encoder.device) if encoder.device.type == "cuda" else "cpu",
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "torch_threads": torch.get_num_threads(),
        "token_budget_rows": encoder.token_budget,
        "prompts": len(prompts),
        "own_tokens": own_tokens,
        "rounds": num_rounds,
        "bare_s": spread([each.bare_s for each in rounds]),
        "stack_s": spread([job.seconds for job in jobs]),
        "bare_own_tokens_per_s": spread([own_tokens / each.bare_s for each in rounds]),
        "stack_own_tokens_per_s": spread([own_tokens / job.seconds for job in jobs]),
        "stack_over_bare_ratio": spread([each.bare_s / each.job.seconds for each in rounds]),
        "accept_ms": spread([1e3 * job.accept_s for job in jobs]),
        "accepted_prompts_per_s": spread([len(prompts) / job.accept_s for job in jobs]),
        "parquet_parts": len(jobs[0].manifest["parts"]),
        "parquet_mb": round(jobs[0].manifest["bytes"] / 1e6, 3),
        "parquet_mb_per_s": spread([job.manifest["bytes"] / 1e6 / job.seconds for job in jobs]),
        **{f"bare_{name}_cpu_cores": spread([each.bare_cores[name] for each in rounds]) for name in jobs[0].cores},
        **{f"stack_{name}_cpu_cores": spread([job.cores[name] for job in jobs]) for name in jobs[0].cores},
    }


def measure_latency(bare: Bare, stack: Stack, prompts: list[str], num_requests: int) -> dict[str, Any]:
    """Time requests on the idle stack and beside a job, and the batch that they may have to wait for."""
    encoder = bare.encoder
    tokenized = encoder.tokenizer(prompts)
    batch = full_batch(encoder, tokenized)
    num_rows = sum(encoder.num_rows(prompt) for prompt in batch)
    spinning = [bare.spinning_forward_s(batch) for _ in range(SPINNING_REPEATS)]
    forwards = [bare.forward_s(batch)]
    pause_s = forwards[0]
    asked = list(islice(cycle(prompts), num_requests))
    alone = [bare.encode_s([prompt]) for prompt in asked]
    stack.predict(asked[0])  # fetches the constant rows, and opens connections
    time.sleep(SETTLE_S)
    idle = stack.latencies(asked, pause_s, between=lambda: forwards.append(bare.forward_s(batch)))
    job = BulkWork(stack, list(islice(cycle(prompts), BATCHES_PER_JOB * len(batch))), BATCHES_LEFT * len(batch))
    busy = stack.latencies(asked, pause_s, between=job.top_up)
    job.top_up()
    batch_s = statistics.median(forwards)
    added_s = statistics.median(busy) - statistics.median(idle)
    return {
        "batch_rows": num_rows,
        "batch_ms": spread([1e3 * each for each in forwards]),
        "batch_spinning_ms": spread([1e3 * each for each in spinning]),
        "predict_requests": num_requests,
        "bare_single_prompt_median_ms": _ms(statistics.median(alone)),
        "predict_idle_median_ms": _ms(statistics.median(idle)),
        "predict_idle_worst_ms": _ms(max(idle)),
        "predict_busy_median_ms": _ms(statistics.median(busy)),
        "predict_busy_worst_ms": _ms(max(busy)),
        "predict_added_median_ms": _ms(added_s),
        "predict_added_median_batches": round(added_s / batch_s, 2),
        "predict_added_worst_batches": round((max(busy) - statistics.median(idle)) / batch_s, 2),
    }


def full_batch(encoder: Encoder, tokenized: Sequence[TokenizedPrompt]) -> list[TokenizedPrompt]:
    """Return what the engine would put into one forward if all of `tokenized` waited, several times over."""
    waiting = list(islice(cycle(tokenized), encoder.token_budget + PATIENCE))  # a prompt has a row at least
    lengths = [encoder.num_rows(prompt) for prompt in waiting]
    return [waiting[position] for position in fill(lengths, encoder.token_budget, PATIENCE)]


class Bare:
    """The encoder with nothing around it; results are cut into prompts and dropped.

    What is timed runs in a thread of its own, as in the worker. The main thread has loaded the encoder and keeps its
    OpenMP threads, so that together there are more than processors, and then OpenMP's barriers sleep rather than spin.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def encode_s(self, prompts: Sequence[str]) -> float:
        """Return the seconds for `prompts`, tokenizing and copying to host memory included."""
        return self._in_thread(lambda: self._encode(prompts))

    def forward_s(self, batch: Sequence[TokenizedPrompt]) -> float:
        """Return the seconds for one forward over all of `batch`."""
        return self._in_thread(lambda: self._forward(batch))

    def spinning_forward_s(self, batch: Sequence[TokenizedPrompt]) -> float:
        """Return the same in the main thread, where barriers spin: faster, unless anything else wants a processor."""
        return seconds(lambda: self._forward(batch), self.encoder.device)

    def _in_thread(self, work: Callable[[], None]) -> float:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(seconds, work, self.encoder.device).result()

    def _encode(self, prompts: Sequence[str]) -> None:
        encoder = self.encoder
        tokenized = encoder.tokenizer(prompts)
        for batch in plan([encoder.num_rows(prompt) for prompt in tokenized], encoder.token_budget):
            self._forward([tokenized[position] for position in batch])

    def _forward(self, batch: Sequence[TokenizedPrompt]) -> None:
        packing, rows = self.encoder.forward(batch)
        self.encoder.encodings(batch, packing.split(rows.cpu()))


class Stack:
    """`layerstack up` as a child process, and what it is asked over HTTP; a context manager.

    Attributes:
        processes: api, worker and broker.
    """

    def __init__(self, folder: Path, checkpoint: Path, encoder: Encoder) -> None:
        port = _free_port()
        self._log = folder / "stack.log"
        self._command = [
            *_layerstack(),
            *("up", "--port", str(port), "--storage", str(folder / "storage"), "--model", str(checkpoint)),
            *("--device", str(encoder.device), "--dtype", str(encoder.dtype).removeprefix("torch.")),
        ]
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("LAYERSTACK_")} | {
            "LAYERSTACK_TOKEN_BUDGET": str(encoder.token_budget),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            # The code beside this file, wherever an installed package would come from.
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
        }
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START_S, trust_env=False)
        self.processes: dict[str, psutil.Process] = {}
        self._ready_bytes: dict[str, int] = {}

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._up = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)  # noqa: S603 - our own command, with no shell
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._http.close()
        self._up.terminate()
        try:
            self._up.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._up.kill()
            self._up.wait()

    def run(self, prompts: list[str]) -> Job:
        """Send a job of `prompts`, and return when its manifest is there."""
        cores = Cores(self.processes)
        started, job, accept_s = self.submit(prompts)
        unfinished = started
        while not job["finished_at"]:
            time.sleep(POLL_S)
            asked = time.time()
            if not (job := self.get(f"/jobs/{job['id']}"))["finished_at"]:
                unfinished = asked
        used = cores.used()
        manifest = self.get(f"/jobs/{job['id']}/results") if job["status"] == "succeeded" else {}
        if manifest.get("succeeded") != len(prompts):
            raise SystemExit(f"the job did not succeed: {job}; the stack's log ends in\n{self._end_of_log()}")
        finished = datetime.fromisoformat(job["finished_at"]).timestamp()
        return Job(max(finished, unfinished) - started, accept_s, manifest, used)

    def submit(self, prompts: list[str], **options: object) -> tuple[float, dict[str, Any], float]:
        """Upload `prompts` -> when (seconds since the epoch), the job, seconds until it was accepted."""
        content = "".join(f"{prompt}\n" for prompt in prompts).encode()
        started, clock = time.time(), time.perf_counter()
        response = self._http.post(
            "/jobs", files={"file": ("prompts.txt", content)}, data={"options": json.dumps(options)}
        )
        accept_s = time.perf_counter() - clock
        if response.status_code != httpx.codes.ACCEPTED:
            raise SystemExit(f"POST /jobs answered {response.status_code}: {response.text}")
        return started, response.json(), accept_s

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON at `path`."""
        return cast("dict[str, Any]", self._http.get(path).raise_for_status().json())

    def predict(self, prompt: str) -> None:
        """Ask for one prompt's embeddings."""
        self._http.post("/predict", params={"format": "safetensors"}, json={"prompt": prompt}).raise_for_status()

    def latencies(self, prompts: list[str], pause_s: float, between: Callable[[], None]) -> list[float]:
        """Ask for one prompt after the other -> the seconds of each; `between` is called before each.

        The pauses are random: without them every request would come when the batch of the one before has just ended.
        """
        pauses = random.Random(0)
        found = []
        for prompt in prompts:
            between()
            time.sleep(pauses.uniform(0, pause_s))
            started = time.perf_counter()
            self.predict(prompt)
            found.append(time.perf_counter() - started)
        return found

    def memory_report(self) -> dict[str, int]:
        """Return the resident memory of each process: what it had when it was ready, and the highest since."""
        peaks = {name: peak_resident_bytes(process.pid) for name, process in self.processes.items()}
        return {f"{name}_ready_rss_mb": round(size / 1e6) for name, size in self._ready_bytes.items()} | {
            f"{name}_peak_rss_mb": round(size / 1e6) for name, size in peaks.items()
        }

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while not self._is_ready():
            if self._up.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the stack did not start; its log ends in\n{self._end_of_log()}")
            time.sleep(POLL_S)
        self.processes = {_role(child): child for child in psutil.Process(self._up.pid).children()}
        for name, process in self.processes.items():
            reset_peak(process.pid)  # loading may need more for a moment
            self._ready_bytes[name] = resident_bytes(process.pid)

    def _is_ready(self) -> bool:
        try:
            return self._http.get("/ready").is_success
        except httpx.TransportError:
            return False

    def _end_of_log(self) -> str:
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])


class BulkWork:
    """One job of `prompts` after the other, so that `reserve` prompts at least are always left; they may repeat."""

    def __init__(self, stack: Stack, prompts: list[str], reserve: int) -> None:
        self._stack, self._prompts, self._reserve = stack, prompts, reserve
        self._send()
        while not self._look()["num_done"]:
            time.sleep(POLL_S)

    def top_up(self) -> None:
        """Send another job if little is left of the last one."""
        if (left := len(self._prompts) - self._look()["num_done"]) < 1:
            raise SystemExit(f"a job of {len(self._prompts)} prompts was done before the request beside it")
        if left < self._reserve:
            self._send()

    def _send(self) -> None:
        self._job = self._stack.submit(self._prompts, deduplicate=False)[1]

    def _look(self) -> dict[str, Any]:
        return self._stack.get(f"/jobs/{self._job['id']}")


def _role(process: psutil.Process) -> str:
    """Return "api" or "worker" for `python -m api` or `python -m worker`; "broker" is a binary."""
    words = process.cmdline()
    return words[words.index("-m") + 1] if "-m" in words else "broker"


def _layerstack() -> list[str]:
    is_module = find_spec("layerstack.__main__") is not None
    return [sys.executable, *(["-m", "layerstack"] if is_module else [str(Path(sys.executable).parent / "layerstack")])]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return cast("int", probe.getsockname()[1])


def _ms(value_s: float) -> float:
    return round(1e3 * value_s, 1)


if __name__ == "__main__":
    main()
