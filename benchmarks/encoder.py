"""The encoder against diffusers' own function, on the same random weights, in one process and in turn.

    python -m benchmarks.encoder --prompts FILE [--limit 64] [--hidden 768] [--fill] [--deterministic] [--json]
    python -m benchmarks.encoder --prompts FILE --device cuda --shape mistral-small-3.2 [--json]

Every round times the reference, ours and the matrix products that ours cannot do without, one after the other, so that
a slow moment of the machine meets all three. The reference does the same work for every prompt, 512 rows, so some of
the prompts do for it; of batch sizes 1, 4 and 8 the fastest counts. Figures are medians over the rounds, in brackets
the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear
from transformers.utils.logging import disable_progress_bar

from benchmarks.contestants import Contestants, load_shape, load_tiny
from benchmarks.measure import PeakMemory, seconds, spread
from encoder import Encoder, Engine
from encoder.batching import plan

REFERENCE_BATCHES = (1, 4, 8)
SUBMISSION = 64
# More than 512 tokens, in any language that uses words.
FILLING_CHARACTERS = 8000


@dataclass(frozen=True)
class Round:
    """Seconds of one round; of the reference, for one prompt. `deterministic`: its time over that without it."""

    reference: float
    ours: float
    products: float
    tokenizing: float
    deterministic: float | None


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoder", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--prompts", type=Path, required=True, help="one prompt a line")
    parser.add_argument("--limit", type=int, default=64, help="prompts in a round, a random sample (default 64)")
    parser.add_argument("--fill", action="store_true", help="join prompts until each fills all 512 tokens")
    parser.add_argument("--hidden", type=int, default=768, help="hidden size of the small checkpoint (default 768)")
    parser.add_argument("--shape", choices=["mistral-small-3.2"], help="the real shape instead, for a GPU of 80 GB")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument("--dtype", help="default bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--token-budget", type=int, help="rows of a forward; default the encoder's")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--deterministic", action="store_true", help="also time the deterministic option")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    disable_progress_bar()
    prompts = sample(args.prompts, args.limit, fill=args.fill)
    options = {"device": args.device, "dtype": args.dtype, "token_budget": args.token_budget}
    with tempfile.TemporaryDirectory() as folder:
        load = load_shape if args.shape else load_tiny
        contestants = load(Path(folder) / "checkpoint", args.hidden, deterministic=args.deterministic, **options)
        report = {"prompts_file": args.prompts.name, "fill": args.fill} | measure(contestants, prompts, args.rounds)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        for name, value in report.items():
            print(f"{name:32} {value}")


def sample(path: Path, limit: int, *, fill: bool) -> list[str]:
    """Draw prompts with a fixed seed; with `fill` each is made of so many that it has more than 512 tokens."""
    generator = random.Random(0)
    lines = path.read_text(encoding="utf-8").splitlines()
    if not fill:
        return generator.sample(lines, min(limit, len(lines)))
    prompts = [""] * limit
    for position in range(limit):
        while len(prompts[position]) < FILLING_CHARACTERS:
            prompts[position] += " " + generator.choice(lines)
    return prompts


@torch.no_grad()
def measure(contestants: Contestants, prompts: list[str], num_rounds: int) -> dict[str, Any]:
    """Time everybody on `prompts`, in turn."""
    encoder, deterministic = contestants.encoder, contestants.deterministic
    tokenized = encoder.tokenizer(prompts)
    rows = [encoder.num_rows(prompt) for prompt in tokenized]
    forwards = [sum(rows[position] for position in batch) for batch in plan(rows, encoder.token_budget)]
    batch, by_batch, reference_peak = _best_batch(contestants, prompts)
    with Engine(encoder) as engine:
        _encode(engine, prompts[:SUBMISSION])  # warms up
        rounds = [
            Round(
                reference=seconds(lambda: contestants.reference(_cycle(prompts, batch)), encoder.device) / batch,
                ours=seconds(lambda: _encode(engine, prompts), encoder.device),
                products=seconds(_products(contestants, forwards), encoder.device),
                tokenizing=seconds(lambda: encoder.tokenizer(prompts), encoder.device),
                deterministic=_slowdown(deterministic, encoder, prompts) if deterministic else None,
            )
            for _ in range(num_rounds)
        ]
        with PeakMemory(encoder.device) as ours_memory:
            _encode(engine, prompts)
        fill = engine.stats().fill
    count = len(prompts)
    report: dict[str, Any] = {
        "model": contestants.description,
        "device": _device_name(encoder.device),
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "attention": encoder.attention,
        "token_budget": encoder.token_budget,
        "prompts": count,
        "own_rows_per_prompt": round(sum(rows) / count, 1),
        "rounds": num_rounds,
        "reference_prompts_per_s_by_batch": by_batch,
        "reference_prompts_per_s": spread([1 / each.reference for each in rounds]),
        "ours_prompts_per_s": spread([count / each.ours for each in rounds]),
        "ratio": spread([each.reference * count / each.ours for each in rounds]),
        "own_tokens_per_s": spread([sum(rows) / each.ours for each in rounds]),
        "forward_fill": round(fill, 3),
        "matmul_efficiency": spread([each.products / each.ours for each in rounds]),
        "tokenizing_share": spread([each.tokenizing / each.ours for each in rounds]),
        "reference_head_share_of_flops": round(contestants.head_share, 3),
        "reference_weights_gb": round(contestants.reference_bytes / 1e9, 3),
        "ours_weights_gb": round(contestants.encoder_bytes / 1e9, 3),
        "reference_peak_gb_over_weights": round(reference_peak / 1e9, 3),
        "ours_peak_gb_over_weights": round(ours_memory.peak_bytes / 1e9, 3),
        "reference_single_prompt_ms": round(1e3 / by_batch[1], 1),
        "ours_single_prompt_ms": _latency(lambda: encoder.encode(prompts[:1]), encoder.device),
        "matmul_ceiling_tflops": round(_ceiling(encoder.device, encoder.dtype), 2),
        "matmul_tflops": spread([sum(rows) * contestants.flops_per_row / each.ours / 1e12 for each in rounds]),
    }
    if deterministic:
        report["deterministic_time_over_plain"] = spread([each.deterministic or 0.0 for each in rounds])
    return report


def _slowdown(deterministic: Encoder, encoder: Encoder, prompts: list[str]) -> float:
    steady, plain = (seconds(partial(each.encode, prompts), encoder.device) for each in (deterministic, encoder))
    return steady / plain


def _encode(engine: Engine, prompts: list[str]) -> None:
    futures = [engine.submit(prompts[start : start + SUBMISSION]) for start in range(0, len(prompts), SUBMISSION)]
    for future in futures:
        future.result()


def _best_batch(contestants: Contestants, prompts: list[str]) -> tuple[int, dict[int, float], int]:
    """Time each of the reference's batch sizes once -> the fastest, the prompts/s of all, the fastest's peak memory."""
    device = contestants.encoder.device
    rates, peaks = {}, {}
    for batch in REFERENCE_BATCHES:
        members = _cycle(prompts, batch)
        if device.type == "cuda" or batch == 1:  # on CPU only the first call of all is slow
            contestants.reference(members)
        with PeakMemory(device) as memory:
            rates[batch] = batch / seconds(partial(contestants.reference, members), device)
        peaks[batch] = memory.peak_bytes
    best = max(rates, key=lambda batch: rates[batch])
    return best, {batch: round(rate, 3) for batch, rate in rates.items()}, peaks[best]


def _cycle(prompts: list[str], count: int) -> list[str]:
    return [prompts[position % len(prompts)] for position in range(count)]


def _products(contestants: Contestants, forwards: list[int]) -> Callable[[], None]:
    """Return what does the matrix products of these forwards, and nothing else."""
    layers = contestants.linears
    dtype, device = contestants.encoder.dtype, contestants.encoder.device
    widths = {weight.shape[1] for layer in layers for weight in layer}
    inputs = {width: torch.randn(max(forwards), width, dtype=dtype, device=device) for width in widths}

    def run() -> None:
        for rows in forwards:
            for layer in layers:
                for weight in layer:
                    linear(inputs[weight.shape[1]][:rows], weight)

    return run


def _latency(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    return round(statistics.median(seconds(work, device) for _ in range(repeats)) * 1e3, 1)


def _ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the TFLOP/s of a plain square matrix product, the best of several."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    linear(left, right)
    return 2 * size**3 / min(seconds(lambda: linear(left, right), device) for _ in range(5)) / 1e12


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
