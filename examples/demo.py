"""From prompts to checked Parquet on one machine: what `make demo` runs.

Starts `layerstack up` on the demo encoder, asks /predict, runs a job over `prompts.txt`, reads its Parquet back, and
compares rows with what diffusers computes from the same checkpoint. Leaves the results in `demo-results/`.
"""

from __future__ import annotations

import json
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape

import layerstack
from layerstack.errors import ServerError, ServerUnreachableError

PROMPTS = Path(__file__).parent / "prompts.txt"
RESULTS = Path("demo-results").resolve()
STORAGE = RESULTS / "storage"
STACK_LOG = RESULTS / "stack.log"
NUM_CHECKED = 8
TOLERANCE = 1e-4
console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    """Run the demo; returns the exit code."""
    started = time.monotonic()
    RESULTS.mkdir(exist_ok=True)
    with local_stack() as url, layerstack.Client(url) as client:
        job_id = use(client)
    folder = STORAGE / "jobs" / job_id
    console.print("[bold]The stack is stopped; what it made stays.[/]")
    read_back(folder)
    largest = compare_with_diffusers(folder)
    agrees = largest <= TOLERANCE
    console.print(f"[bold]Parquet:[/] {folder / 'parts' / '00000.parquet'}")
    console.print(
        f"done in {time.monotonic() - started:.0f} s" if agrees else "[red]the rows differ from diffusers'[/]"
    )
    return 0 if agrees else 1


@contextmanager
def local_stack() -> Iterator[str]:
    """Run `layerstack up` for the time of the block, and yield its URL once it is ready."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "layerstack"), "up", "--port", str(port), "--storage", str(STORAGE)]
    console.print(f"[bold]$ {shlex.join(command)}[/]  (its log: {STACK_LOG})")
    console.print("[yellow]The demo encoder has RANDOM weights: its numbers are right, its embeddings mean nothing.[/]")
    url = f"http://127.0.0.1:{port}"
    with STACK_LOG.open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as stack:
        try:
            wait_until_ready(url, stack)
            yield url
        finally:
            stack.send_signal(signal.SIGTERM)
            stack.wait()


def wait_until_ready(url: str, stack: subprocess.Popen[bytes]) -> None:
    """Return once a worker has loaded the encoder."""
    with console.status("waiting for the encoder"), layerstack.Client(url, retry_s=0) as client:
        while stack.poll() is None:
            try:
                encoder = client.encoder()
            except (ServerError, ServerUnreachableError):
                time.sleep(0.2)
            else:
                console.print(f"ready: layers {encoder.layers}, {encoder.embed_dim} values a token, {encoder.dtype}")
                return
    raise SystemExit(f"the stack did not start:\n{STACK_LOG.read_text()}")


def use(client: layerstack.Client) -> str:
    """Ask for two prompts at once, then run a job; returns its id."""
    answer = client.predict(["hello world", "hello world"])
    console.print(f"/predict: prompt_embeds {answer.prompt_embeds.shape}, text_ids {answer.text_ids.shape}")
    job = client.jobs.submit(PROMPTS)
    job.wait(progress=True)
    console.print(f"job {job.id}: {job.view.num_succeeded} prompts in {job.view.num_parts} parts")
    return job.id


def read_back(folder: Path) -> None:
    """Show how the results are read, by reading them."""
    # Double quotes only, so that a shell's single ones go around it.
    code = (
        f"import layerstack; d = layerstack.read({json.dumps(str(folder))}); r = d[0]; "
        'print(len(d), "rows; the first:", r["prompt"], tuple(r["prompt_embeds"].shape), tuple(r["text_ids"].shape))'
    )
    console.print(f"[bold]$[/] {sys.executable} -c {escape(shlex.quote(code))}")
    subprocess.run([sys.executable, "-c", code], check=True)


def compare_with_diffusers(folder: Path) -> float:
    """Return the largest difference between stored rows and diffusers' own on the same checkpoint."""
    import torch  # noqa: PLC0415 - takes seconds, and is not needed before
    from diffusers import Flux2Pipeline  # noqa: PLC0415
    from transformers import AutoTokenizer, Mistral3ForConditionalGeneration  # noqa: PLC0415
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

    disable_progress_bar()

    rows = layerstack.read(folder)
    chosen = [rows[position] for position in sorted(random.Random(0).sample(range(len(rows)), NUM_CHECKED))]
    checkpoint = STORAGE / "demo-encoder-mistral3"
    with console.status("asking diffusers for the same prompts"), torch.no_grad():
        want = Flux2Pipeline._get_mistral_3_small_prompt_embeds(
            Mistral3ForConditionalGeneration.from_pretrained(checkpoint / "text_encoder"),
            AutoTokenizer.from_pretrained(checkpoint / "tokenizer"),
            [row["prompt"] for row in chosen],
        )
    got = torch.stack([row["prompt_embeds"] for row in chosen])
    same_ids = torch.equal(torch.stack([row["text_ids"] for row in chosen]), Flux2Pipeline._prepare_text_ids(want))
    largest = float((got - want).abs().max())
    console.print(
        f"{NUM_CHECKED} rows against Flux2Pipeline._get_mistral_3_small_prompt_embeds: largest difference "
        f"{largest:.1e} on values up to {float(want.abs().max()):.1f}; text_ids {'equal' if same_ids else 'DIFFER'}"
    )
    return largest if same_ids else float("inf")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(main())
