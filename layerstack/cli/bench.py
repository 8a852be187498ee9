"""`layerstack bench`."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import typer

from layerstack.cli.console import AsJson, Url, connect, print_fields, print_json, progress
from layerstack.client import Client

_PROMPTS = (
    "a fox in the snow",
    "an old lighthouse keeper reads a map by candlelight, oil painting",
    "A close-up of a red pickup truck on a sandy beach at dusk: its glossy paint reflects the last orange light.",
    "isometric drawing of a tiny bakery, pastel colours",
)
# Two values cut the requests into a hundred parts only if there are some.
_FEWEST_REQUESTS = 2


def bench(
    prompts: Annotated[Path | None, typer.Option(help="A file, one prompt a line; default four of its own.")] = None,
    requests: Annotated[int, typer.Option(min=_FEWEST_REQUESTS, help="One prompt each, one after the other.")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Prompts that are then sent at once.")] = 64,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Measure how fast a server answers here: one prompt at a time, then many at once."""
    lines = _lines(prompts) if prompts else list(_PROMPTS)
    with connect(url) as client:
        encoder = client.encoder()
        client.predict(lines[0])  # connects
        alone_ms = _alone(client, lines, requests)
        many = [lines[n % len(lines)] for n in range(batch)]
        started = time.perf_counter()
        answer = client.predict(many)
        seconds = time.perf_counter() - started
    summary: dict[str, Any] = {
        "url": client.url,
        "model": encoder.model,
        "device": encoder.device,
        "requests": requests,
        "median_ms": round(median(alone_ms), 1),
        "p95_ms": round(quantiles(alone_ms, n=100)[94], 1),
        "batch": batch,
        "prompts_per_s": round(batch / seconds, 1),
        "rows_per_s": round(sum(map(len, answer.own_rows)) / seconds, 1),
        "fingerprint": encoder.fingerprint,
    }
    if as_json:
        print_json(summary)
    else:
        print_fields(summary)


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError as exc:
        raise typer.BadParameter(f"{file} is not UTF-8", param_hint="--prompts") from exc
    if not lines:
        raise typer.BadParameter(f"{file} is empty", param_hint="--prompts")
    return lines


def _alone(client: Client, lines: list[str], requests: int) -> list[float]:
    """Return the milliseconds that each request took."""
    times_ms = []
    with progress("requests") as bar:
        for n in bar.track(range(requests), description="one at a time"):
            started = time.perf_counter()
            client.predict(lines[n % len(lines)])
            times_ms.append(1000 * (time.perf_counter() - started))
    return times_ms
