"""How far bfloat16 is from float32: ours and diffusers' own function, both against diffusers in float32.

    python -m benchmarks.precision --prompts FILE [FILE ...] [--limit 100] [--hidden 64] [--json]

All prompts in float32 by the reference, then in bfloat16 by the reference (batches of 4) and by ours (packed). The
error of a row is the norm of its difference relative to the norm of the float32 row; only rows that a prompt adds
count, for the constants are the same for all.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import Flux2Pipeline
from transformers import AutoTokenizer, Mistral3ForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from encoder import Encoder, tiny

BATCH = 4


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="files of one prompt a line")
    parser.add_argument("--limit", type=int, default=100, help="prompts of each file, a random sample (default 100)")
    parser.add_argument("--hidden", type=int, default=64, help="hidden size of the checkpoint (default 64)")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        tiny.write(checkpoint, hidden=args.hidden)
        report = measure(checkpoint, args.prompts, args.limit, args.device)
    if args.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{'prompts':12} {'':10} {'mean':>9} {'99 %':>9} {'largest':>9}")
    for name, errors in report.items():
        for who, (mean, tail, largest) in errors.items():
            print(f"{name:12} {who:10} {mean:9.5f} {tail:9.5f} {largest:9.5f}")


@torch.no_grad()
def measure(folder: Path, files: list[Path], limit: int, device: str) -> dict[str, dict[str, list[float]]]:
    """Return for each file the errors of both: mean over rows, 99th percentile, largest."""
    exact, rounded = (_reference(folder, dtype, device) for dtype in (torch.float32, torch.bfloat16))
    encoder = Encoder.load(folder, device=device, dtype="bfloat16")
    report = {}
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        prompts = random.Random(0).sample(lines, min(limit, len(lines)))
        ours = [encoding.own_rows.float() for encoding in encoder.encode(prompts)]
        errors: dict[str, list[torch.Tensor]] = {"reference": [], "ours": []}
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            wanted, plain = exact(batch), rounded(batch).float()
            for position, own in enumerate(ours[start : start + BATCH]):
                want = wanted[position, -len(own) :]
                errors["ours"].append(_relative(own, want))
                errors["reference"].append(_relative(plain[position, -len(own) :], want))
        report[file.name] = {who: _summary(torch.cat(each)) for who, each in errors.items()}
    return report


def _reference(folder: Path, dtype: torch.dtype, device: str) -> Callable[[list[str]], torch.Tensor]:
    model = Mistral3ForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=dtype).to(device)
    model.lm_head = torch.nn.Identity()  # its scores are not looked at, and take most of a small model's time
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return lambda prompts: Flux2Pipeline._get_mistral_3_small_prompt_embeds(model, tokenizer, prompts)


def _relative(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """`[n, D]` twice -> the relative error of each row `[n]`."""
    return (got - want).norm(dim=-1) / want.norm(dim=-1)


def _summary(errors: torch.Tensor) -> list[float]:
    values = (errors.mean(), errors.quantile(0.99), errors.max())
    return [float(f"{value.item():.3g}") for value in values]


if __name__ == "__main__":
    main()
