"""One large job: how fast it is accepted, what API and worker take of memory, and how soon a cancel is seen.

    python -m benchmarks.large_job --prompts FILE [--count 1000000] [--parts 100] [--hidden 64] [--json]

Uploads a JSONL file of `--count` different prompts, which are those of FILE with a number behind them, to a stack of
its own (`layerstack up`). Then it watches the worker's memory until so many parts are done, and cancels the job.

Peaks count from when the stack was ready. The worker's memory is sampled every half second; `worker_rss_mb_10` and
`worker_rss_mb_end` are the medians of the samples from 5 to 15 finished parts, and over the last tenth of them.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from benchmarks.measure import peak_resident_bytes, resident_bytes
from benchmarks.stack import POLL_S, Stack
from encoder import tiny

# The first parts are written while the worker still grows: torch and pyarrow fill their pools.
EARLY_PARTS = range(5, 16)
CANCEL_POLL_S = 0.05


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.large_job", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--prompts", type=Path, required=True, help="one prompt a line")
    parser.add_argument("--count", type=int, default=1_000_000, help="prompts of the job (default 1000000)")
    parser.add_argument("--parts", type=int, default=100, help="parts until it is cancelled (default 100)")
    parser.add_argument("--hidden", type=int, default=64, help="hidden size of the small checkpoint (default 64)")
    parser.add_argument("--storage", type=Path, help="existing folder to make the stack's own folder in, for its time")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # or the stack would outlive this process
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="layerstack-benchmark-", dir=args.storage) as folder:
        checkpoint, prompts = Path(folder) / "checkpoint", Path(folder) / "prompts.jsonl"
        tiny.write(checkpoint, hidden=args.hidden)
        write_prompts(prompts, args.prompts.read_text(encoding="utf-8").splitlines(), args.count)
        with Stack(Path(folder), checkpoint, args.device) as stack:
            report = {"prompts": args.count, "jsonl_mb": round(prompts.stat().st_size / 1e6, 1)} | measure(
                stack, prompts, args.count, args.parts
            )
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        for name, value in report.items():
            print(f"{name:32} {value}")


def write_prompts(path: Path, lines: list[str], count: int) -> None:
    """Write `count` prompts as JSON lines, no two alike."""
    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            file.write(json.dumps({"id": str(n), "prompt": f"{lines[n % len(lines)]} {n}"}) + "\n")


def measure(stack: Stack, prompts: Path, count: int, num_parts: int) -> dict[str, Any]:
    """Upload, watch and cancel the job."""
    api, worker = stack.processes["api"], stack.processes["worker"]
    with prompts.open("rb") as file:
        _, job, accept_s = stack.upload(prompts.name, file)
    api_peak = peak_resident_bytes(api.pid)
    path, samples = f"/jobs/{job['id']}", list[tuple[int, int]]()
    wanted, done = min(num_parts, job["num_parts"]), 0
    while done < wanted:
        time.sleep(POLL_S)
        done = stack.get(path)["num_parts_done"]
        samples.append((done, resident_bytes(worker.pid)))
    cancelled = time.perf_counter()
    stack.ask("POST", f"{path}/cancel")
    while stack.get(path)["status"] == "cancelling":
        time.sleep(CANCEL_POLL_S)
    cancel_s = time.perf_counter() - cancelled
    early = statistics.median(size for parts, size in samples if parts in EARLY_PARTS)
    late = statistics.median(size for parts, size in samples if parts >= 0.9 * wanted)
    return {
        "parts_of_the_job": job["num_parts"],
        "accept_s": round(accept_s, 2),
        "accepted_prompts_per_s": round(count / accept_s),
        "api_peak_rss_mb": round(api_peak / 1e6),
        "parts_done": done,
        "worker_rss_mb_10": round(early / 1e6),
        "worker_rss_mb_end": round(late / 1e6),
        "worker_growth": round(late / early - 1, 3),
        "cancelled_after_s": round(cancel_s, 2),
    }


if __name__ == "__main__":
    main()
