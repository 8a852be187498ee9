"""Injects many faults into a running stack, and prints what became of it: `python -m tests.faults.long --faults 200`.

Each kind strikes equally often, in random order. Four fifths strike a stack whose storage is a folder, the others one
whose storage is a bucket. Every job is checked row by row. The first thing that is wrong ends it, with exit code 1.
"""

import argparse
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from encoder import tiny
from tests.faults.bucket import URL, running_bucket
from tests.faults.campaign import Campaign
from tests.faults.checks import check_tidy, finished_rows
from tests.faults.cluster import Cluster
from tests.faults.faults import BUCKET_FAULTS, COMBINED_FAULTS, FAULTS, FOLDER_FAULTS
from tests.faults.scene import Fault, Recovery
from tests.faults.workload import known_prompts, submit

EVERYWHERE = FAULTS + COMBINED_FAULTS
WORKERS = 3
# Crashes that a chunk has: no chunk is given up here.
MANY = 1000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.long", description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of what is drawn at random")
    parser.add_argument("--only", help="part of the names of the kinds to inject")
    parser.add_argument("--keep", type=Path, help="folder for logs and jobs, which stay there; default one that goes")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(1))  # which ends the processes of the stack as well
    print(f"--faults {args.faults} --seed {args.seed}", flush=True)
    started, rng = time.monotonic(), random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = args.keep or Path(temporary)
        tiny.write(folder / "model", hidden=32)
        on_bucket = args.faults // 5
        campaigns = [
            on_folder(folder, rng, drawn(rng, EVERYWHERE + FOLDER_FAULTS, args.faults - on_bucket, args.only)),
            on_a_bucket(folder, rng, drawn(rng, EVERYWHERE + BUCKET_FAULTS, on_bucket, args.only)),
        ]
    minutes = (time.monotonic() - started) / 60
    jobs, rows = (sum(getattr(campaign, name) for campaign in campaigns) for name in ("jobs", "rows"))
    recoveries = [recovery for campaign in campaigns for recovery in campaign.recoveries]
    report = (
        f"{len(recoveries)} faults in {minutes:.0f} minutes, during {jobs} jobs with {rows} rows: none lost, none "
        f"doubled, none wrong.\n\n{table(recoveries)}"
    )
    print(report)
    if args.out:
        args.out.write_text(report)


def on_folder(folder: Path, rng: random.Random, faults: list[Fault]) -> Campaign:
    with Cluster(folder / "folder", folder / "model", workers=WORKERS, chunk_crashes=MANY) as cluster:
        campaign = begun(cluster, rng)
        campaign.run(faults)
        campaign.storm()
        check_tidy(cluster)
        return campaign


def on_a_bucket(folder: Path, rng: random.Random, faults: list[Fault]) -> Campaign:
    (folder / "bucket").mkdir()
    with running_bucket(folder / "bucket") as environment:
        options = {"storage": URL, "environment": environment, "chunk_crashes": MANY}
        with Cluster(folder / "bucket", folder / "model", workers=WORKERS, **options) as cluster:
            campaign = begun(cluster, rng)
            campaign.run(faults)
            check_tidy(cluster)
            return campaign


def begun(cluster: Cluster, rng: random.Random) -> Campaign:
    """Run a job that nothing disturbs, to know what is right."""
    prompts = [{"id": str(n), "prompt": prompt} for n, prompt in enumerate(known_prompts(rng, 300))]
    known = finished_rows(cluster, submit(cluster, rng, prompts))
    print(f"{len(cluster.workers)} workers on {cluster.storage_url} are ready", flush=True)
    return Campaign(cluster, rng, known)


def drawn(rng: random.Random, kinds: list[Fault], count: int, only: str | None) -> list[Fault]:
    """Draw `count` faults, of each kind equally many, in random order."""
    chosen = [kind for kind in kinds if (only or "") in kind.name]
    found = [chosen[n % len(chosen)] for n in range(count)]
    rng.shuffle(found)
    return found


def table(recoveries: list[Recovery]) -> str:
    lines = [
        "| fault | count | goes on after: median | worst | made good after: median | worst |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted({recovery.fault for recovery in recoveries}):
        of_it = [recovery for recovery in recoveries if recovery.fault == name]
        columns = [[each.goes_on_s for each in of_it], [each.made_good_s for each in of_it]]
        figures = " | ".join(f"{statistics.median(column):.1f} s | {max(column):.1f} s" for column in columns)
        lines.append(f"| `{name}` | {len(of_it)} | {figures} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
