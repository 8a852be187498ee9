"""Reading dense tensors from a job's parts against one file a prompt: prompts/s and bytes on disk, in one run.

    python -m benchmarks.reader --prompts FILE [--limit 64] [--rounds 5] [--json]

Rows are random values, as many of a prompt as the real vocabulary gives it tokens: D = 15360 in bfloat16, 512 rows a
dense prompt, 32 of them the prefix. The contestants (`benchmarks/reader_contestants.py`) have the same embeddings:
ours all prompts of FILE, as a job's parts; the others a sample of `--limit`, 15.7 MB each, which is what all are asked
for. Every read ends in the same preallocated batch, as for a copy to a device, since a mapped file is not read before
its values are used.

A round has everybody read the sample in turn, 8 prompts at a time, so that a slow moment of the machine meets all;
`random` draws an order of its own for each round. Before each `cold` round all files are taken out of the page cache;
`warm` rounds come after, so that the cache holds what reading has put there. Torch copies with one thread, as in a
worker of a DataLoader. Figures are medians over the rounds, then the lowest and the highest; ratios are those of each
round. `ours` reads with `stack`, straight into the batch; `ours_by_row` makes a tensor of each prompt first.

`bytes_of_all_prompts` is exact for ours. The others' is that of the sample, times all prompts over those in it: a dense
prompt takes the same room whatever it says.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.measure import seconds, spread
from benchmarks.reader_contestants import CONTESTANTS, EMBED_DIM, LENGTH, Contestant, Rows
from encoder import Encoder, tiny

BATCH = 8
CPU = torch.device("cpu")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reader", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=Path, required=True, help="one prompt a line")
    parser.add_argument("--limit", type=int, default=64, help="prompts that are read, a random sample (default 64)")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--folder", type=Path, help="existing folder to write in (default the system's)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(args.threads)
    prompts = args.prompts.read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory(prefix="layerstack-benchmark-", dir=args.folder) as folder:
        rows = Rows(token_counts(Path(folder) / "checkpoint", prompts))
        sample = sorted(random.Random(0).sample(range(len(rows)), min(args.limit, len(rows))))
        report = {"prompts_file": args.prompts.name, "threads": args.threads} | measure(
            Path(folder), rows, sample, args.rounds
        )
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        for name, value in report.items():
            print(f"{name:32} {value}")


def token_counts(checkpoint: Path, prompts: list[str]) -> list[int]:
    """Return the number of each prompt's own rows, by the real vocabulary."""
    tiny.write(checkpoint, hidden=16)
    encoder = Encoder.load(checkpoint, device="cpu")
    return [len(prompt.own_ids) for prompt in encoder.tokenizer(prompts)]


def measure(folder: Path, rows: Rows, sample: Sequence[int], num_rounds: int) -> dict[str, Any]:
    """Let everybody write, and then read in turn."""
    contestants = {name: kind(folder / name.removesuffix("_by_row")) for name, kind in CONTESTANTS.items()}
    written_s = {name: seconds(partial(each.write, rows, sample), CPU) for name, each in contestants.items()}
    writers = {name: each for name, each in contestants.items() if name != "ours_by_row"}
    counts = {name: len(rows) if name == "ours" else len(sample) for name in writers}
    sizes = {name: each.size() / counts[name] for name, each in writers.items()}  # of a prompt
    report: dict[str, Any] = {
        "prompts": len(rows),
        "prompts_read": len(sample),
        "own_rows_per_prompt": round(sum(rows.own_rows) / len(rows), 1),
        "rounds": num_rounds,
        "written_mb_per_s": {name: round(each.size() / written_s[name] / 1e6) for name, each in writers.items()},
        "bytes_of_all_prompts": {name: round(size * len(rows)) for name, size in sizes.items()},
        "bytes_over_ours": {name: round(size / sizes["ours"], 2) for name, size in sizes.items() if name != "ours"},
    }
    batch = torch.zeros(BATCH, LENGTH, EMBED_DIM, dtype=torch.bfloat16)
    check(contestants, rows, sample, batch)
    for order in ("random", "sequential"):
        for cache in ("cold", "warm"):
            those = contestants if cache == "warm" else {name: contestants[name] for name in writers}
            times, from_disk = _rounds(those, sample, batch, num_rounds, order, cache)
            report[f"{order}_{cache}_prompts_per_s"] = {
                name: spread([len(sample) / each for each in found]) for name, found in times.items()
            }
            for name in sorted(set(times) - set(sizes) | {"ours"}):
                report[f"{order}_{cache}_{name}_over"] = {
                    other: spread([theirs / ours for theirs, ours in zip(found, times[name], strict=True)])
                    for other, found in times.items()
                    if not other.startswith("ours")
                }
            if cache == "cold":
                report[f"{order}_cold_mb_read_per_prompt"] = from_disk
    return report


def check(contestants: dict[str, Contestant], rows: Rows, sample: Sequence[int], batch: torch.Tensor) -> None:
    """See that everybody reads the same values.

    Raises:
        RuntimeError: somebody does not.
    """
    some = sample[:BATCH]
    wanted = torch.stack([torch.from_numpy(rows.dense(position).view("i2")) for position in some])
    for name, each in contestants.items():
        each.open()
        batch.zero_()
        each.read(some, batch[: len(some)])
        if not torch.equal(batch[: len(some)].view(torch.int16), wanted):
            raise RuntimeError(f"{name} reads other values than were written")
        each.close()


def _rounds(
    contestants: dict[str, Contestant], sample: Sequence[int], batch: torch.Tensor, count: int, order: str, cache: str
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds of each in each round, and the megabytes a prompt that came from the disk."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    read_bytes = dict.fromkeys(contestants, 0)
    for number in range(count):
        positions = list(sample)
        if order == "random":
            random.Random(number).shuffle(positions)
        if cache == "cold":
            for each in contestants.values():
                each.forget()
        for name, each in contestants.items():
            times[name].append(0.0)
            each.open()
        for start in range(0, len(positions), BATCH):
            some = positions[start : start + BATCH]
            for name, each in contestants.items():
                before = psutil.Process().io_counters().read_bytes
                times[name][-1] += seconds(partial(each.read, some, batch[: len(some)]), CPU)
                read_bytes[name] += psutil.Process().io_counters().read_bytes - before
        for each in contestants.values():
            each.close()
    per_prompt = {name: round(size / count / len(sample) / 1e6, 2) for name, size in read_bytes.items()}
    return times, per_prompt


if __name__ == "__main__":
    main()
