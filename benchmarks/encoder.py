"""The encoder against diffusers' own function, on the same small checkpoint, in one process and in turn.

    python -m benchmarks.encoder --prompts FILE [--limit 32] [--hidden 64] [--json]

Prints prompts per second of both and their ratio, the median of several rounds with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import Flux2Pipeline
from transformers import AutoTokenizer, Mistral3ForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from encoder import Encoder, tiny

ROUNDS = 3
REFERENCE_BATCH = 4


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoder", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--prompts", type=Path, required=True, help="one prompt a line")
    parser.add_argument("--limit", type=int, default=32, help="prompts in a round, a random sample (default 32)")
    parser.add_argument("--hidden", type=int, default=64, help="hidden size of the checkpoint (default 64)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    prompts = args.prompts.read_text(encoding="utf-8").splitlines()
    prompts = random.Random(0).sample(prompts, min(args.limit, len(prompts)))
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder) / "checkpoint", prompts, args.hidden)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        for name, value in report.items():
            print(f"{name:22} {value}")


@torch.no_grad()
def measure(folder: Path, prompts: list[str], hidden: int) -> dict[str, object]:
    """Time both on `prompts`, in turn, so that a slow moment of the machine meets both."""
    disable_progress_bar()
    tiny.write(folder, hidden=hidden)
    encoder = Encoder.load(folder, device="cpu", dtype="float32")
    model = Mistral3ForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def reference() -> None:
        for start in range(0, len(prompts), REFERENCE_BATCH):
            batch = prompts[start : start + REFERENCE_BATCH]
            Flux2Pipeline._get_mistral_3_small_prompt_embeds(model, tokenizer, batch)

    def ours() -> None:
        encoder.encode(prompts)

    rounds = [(seconds(reference), seconds(ours)) for _ in range(ROUNDS)]
    ratios = [slow / fast for slow, fast in rounds]
    return {
        "prompts": len(prompts),
        "hidden": hidden,
        "reference_prompts_per_s": round(len(prompts) / statistics.median(slow for slow, _ in rounds), 2),
        "ours_prompts_per_s": round(len(prompts) / statistics.median(fast for _, fast in rounds), 2),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_lowest": round(min(ratios), 2),
        "ratio_highest": round(max(ratios), 2),
    }


def seconds(work: Callable[[], None]) -> float:
    """Return how long `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
