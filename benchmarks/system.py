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
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.encoder import sample
from benchmarks.measure import Cores, seconds, spread
from benchmarks.stack import BulkWork, Job, Stack
from encoder import Encoder, tiny
from encoder.batching import fill, plan
from encoder.prompts import TokenizedPrompt

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
    parser.add_argument("--chunk-tokens", type=int, help="rows stored of one chunk, about; default the stack's")
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
        dtype = ("--dtype", str(encoder.dtype).removeprefix("torch."))
        with Stack(
            Path(folder), checkpoint, str(encoder.device), options=dtype, token_budget=encoder.token_budget
        ) as stack:
            bare = Bare(encoder)
            report = {
                "prompts_file": args.prompts.name,
                "hidden_size": args.hidden,
                **measure_throughput(bare, stack, prompts, args.rounds, chunk_tokens=args.chunk_tokens),
                **measure_latency(bare, stack, prompts, args.requests),
                **stack.memory_report(),
            }
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        for name, value in report.items():
            print(f"{name:32} {'{:g} ({:g} to {:g})'.format(*value) if isinstance(value, list) else value}")


def measure_throughput(
    bare: Bare, stack: Stack, prompts: list[str], num_rounds: int, **options: object
) -> dict[str, Any]:
    """Time both on `prompts`, in turn; `options` are those of the jobs."""
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
        rounds.append(Round(bare_s, bare_cores, stack.run(prompts, **options)))
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


def _ms(value_s: float) -> float:
    return round(1e3 * value_s, 1)


if __name__ == "__main__":
    main()
