"""POST /predict under load, against the bare engine and against a plain port of the service it takes the place of.

    python -m benchmarks.http [--prompts FILE] [--limit 128] [--hidden 768] [--clients 1 8 64] [--seconds 10] [--json]
    python -m benchmarks.http --wide [--json]

All three have the same checkpoint, dtype, prompts and number of torch threads, and each its own process: the bare
engine (`benchmarks/bare_engine.py`), `layerstack up`, and the plain port (`benchmarks/plain_service.py`). First one
client without a load generator asks the idle stack for some prompts (`benchmarks/http_idle.py`). Then, in each round,
for each format in turn, the bare engine encodes the prompts while the stack is idle: all waiting at once, then a few
one at a time. Then so many clients ask the stack, each for one prompt after the other without a pause. At the end the
same clients ask the plain port, which knows JSON alone. It is slow, so each of its loads is over after a few answers,
and with more clients than answers no latency is given.

- The clients are locust's (`benchmarks/http_load.py`), in one more process. On a machine with few cores they compete
  with the server; how many processors they and each part of the stack keep busy is in the report.
- A latency is from sending a request to the last byte of its answer. The encoder's own time is what the worker tells in
  `Layerstack-Encode-Ms`, from the submission of a prompt to its rows: the wait for a batch is in it.
- The measured time begins when each client has been answered once, on average. An answer of 429 is sent again after
  its `Retry-After`; `statuses` counts them. Lists are median, lowest and highest.
- `render_ms` is `api.formats` making the same answer in this process, alone. `render_share` is that over the median
  latency, and `render_cpu_share` over the API's processor time for an answer.

With `--wide` none of this, but one client on the idle stack with rows as wide as the real model's
(`benchmarks/http_wide.py`), and beside it the plain port's way of writing the same tensor.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from transformers.utils.logging import disable_progress_bar

from api.formats import Format
from api.rows import Padding
from benchmarks import http_wide
from benchmarks.bare_engine import BareEngine, Turn
from benchmarks.encoder import sample
from benchmarks.http_clients import Load, run_load
from benchmarks.http_idle import ask_in_turn
from benchmarks.http_rendering import render_ms
from benchmarks.measure import spread
from benchmarks.stack import POLL_S, START_S, Stack, free_port
from encoder import tiny

_ROOT = Path(__file__).parents[1]
# A load begins when what the one before left behind is done.
SETTLE_S = 1.0
SINGLE = 8
IDLE_ROUNDS = 30
PLAIN_ANSWERS, PLAIN_LIMIT_S = 3, 300.0
_LOADS = ("idle", "stack", "plain")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=Path, default=_ROOT / "examples" / "prompts.txt", help="one prompt a line")
    parser.add_argument("--limit", type=int, default=128, help="prompts, a random sample (default 128)")
    parser.add_argument("--hidden", type=int, default=768, help="hidden size of the small checkpoint (default 768)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], help="default 1 8 64")
    parser.add_argument("--formats", nargs="+", choices=list(Format), default=list(Format), help="default all")
    parser.add_argument("--padding", choices=list(Padding), default="max_length", help="rows asked for (default all)")
    parser.add_argument("--seconds", type=float, default=10, help="of each load on the stack (default 10)")
    parser.add_argument("--rounds", type=int, default=1, help="default 1")
    parser.add_argument("--plain-answers", type=int, default=PLAIN_ANSWERS, help="of a load on the plain port")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument("--dtype", help="default bfloat16 on CUDA and with --wide, float32 elsewhere")
    parser.add_argument("--token-budget", type=int, help="rows of a forward; default the encoder's")
    parser.add_argument("--wide", action="store_true", help="one client, rows as wide as the real model's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # or the stack would outlive this process
    disable_progress_bar()
    prompts = sample(args.prompts, args.limit, fill=False)
    report: dict[str, Any] = {"prompts_file": args.prompts.name}
    if args.wide:
        report |= http_wide.measure(prompts[0], args.formats, args.device, args.dtype or http_wide.DTYPE)
    else:
        report |= {"hidden_size": args.hidden, **measure(prompts, args)}
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)


@dataclass(frozen=True)
class FormatTurn:
    """One format in one round: the bare engine's turn before it, and the loads on the stack."""

    answer_format: str
    bare: Turn
    loads: list[Load]


def measure(prompts: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Let the three take turns."""
    started = time.monotonic()
    options = {"device": args.device, "dtype": args.dtype, "token_budget": args.token_budget}
    with tempfile.TemporaryDirectory(prefix="layerstack-benchmark-") as name:
        folder = Path(name)
        checkpoint, prompts_file = folder / "checkpoint", folder / "prompts.json"
        tiny.write(checkpoint, hidden=args.hidden)
        prompts_file.write_text(json.dumps(prompts), encoding="utf-8")
        with BareEngine(checkpoint, prompts, SINGLE, seconds=args.seconds, **options) as bare:
            facts = bare.facts
            words, budget = ("--dtype", facts.dtype), facts.token_budget
            with Stack(folder, checkpoint, facts.device, options=words, token_budget=budget) as stack:
                idle = ask_in_turn(stack.url, prompts, args.formats, IDLE_ROUNDS, args.padding)
                turns = _stack_turns(bare, stack, prompts_file, args)
                rendering = render_ms(args.formats, args.padding, facts, facts.own_tokens // len(prompts))
                memory = stack.memory_report()
        plain = [
            _plain_load(checkpoint, facts.device, facts.dtype, prompts_file, clients, args.plain_answers)
            for clients in args.clients
        ]
    bare_rates = [turn.bare.prompts_per_s for turn in turns]
    singles = [1e3 * each for turn in turns for each in turn.bare.single_s]
    return {
        "device": facts.device,
        "dtype": facts.dtype,
        "embed_dim": facts.embed_dim,
        "token_budget_rows": facts.token_budget,
        "prompts": len(prompts),
        "own_tokens": facts.own_tokens,
        "padding": args.padding,
        "bare_prompts_per_s": spread(bare_rates),
        "bare_single_prompt_ms": spread(singles),
        "render_ms": rendering,
        "idle": idle,
        "stack": _stack_report(turns, rendering, plain),
        "plain": [load.report() for load in plain],
        **memory,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }


def _stack_turns(bare: BareEngine, stack: Stack, prompts: Path, args: argparse.Namespace) -> list[FormatTurn]:
    turns = []
    for _ in range(args.rounds):
        for answer_format in args.formats:
            time.sleep(SETTLE_S)
            turn = FormatTurn(answer_format, bare.turn(), [])
            for clients in args.clients:
                time.sleep(SETTLE_S)
                load = run_load(
                    stack.url,
                    prompts,
                    clients,
                    stack.processes,
                    query=f"?format={answer_format}&padding={args.padding}",
                    warm_up=clients,
                    seconds=args.seconds,
                )
                turn.loads.append(load)
                print(f"{answer_format}, {clients} clients: {load.prompts_per_s:.3g} prompts/s", file=sys.stderr)
            turns.append(turn)
    return turns


def _plain_load(checkpoint: Path, device: str, dtype: str, prompts: Path, clients: int, answers: int) -> Load:
    with plain_service(checkpoint, device, dtype) as (url, process):
        return run_load(url, prompts, clients, {"service": process}, warm_up=1, seconds=PLAIN_LIMIT_S, wanted=answers)


@contextmanager
def plain_service(checkpoint: Path, device: str, dtype: str) -> Iterator[tuple[str, psutil.Process]]:
    """Start the plain port -> where it answers, and its process."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "benchmarks.plain_service", str(checkpoint), "--port", str(port)]
    command += ["--device", device, "--dtype", dtype]
    service = subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=sys.stderr)  # noqa: S603 - our own command, with no shell
    try:
        deadline = time.monotonic() + START_S
        while not _answers(url):
            if service.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the plain port did not start; its messages are above")
            time.sleep(POLL_S)
        yield url, psutil.Process(service.pid)
    finally:
        service.kill()  # at a SIGTERM it would first answer all who wait
        service.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", trust_env=False).is_success
    except httpx.TransportError:
        return False


def _stack_report(turns: list[FormatTurn], rendering: dict[str, float], plain: list[Load]) -> list[dict[str, Any]]:
    """Return the figures of each load on the stack, with what they are to the others'."""
    plain_rates = {load.clients: load.prompts_per_s for load in plain}
    reports = []
    for turn in turns:
        for load in turn.loads:
            each = {"format": turn.answer_format, **load.report()}
            rate, plain_rate = load.prompts_per_s, plain_rates[load.clients]
            each["over_bare_ratio"] = _short(rate / turn.bare.prompts_per_s)
            if plain_rate:
                each["over_plain_ratio"] = _short(rate / plain_rate)
            if "latency_ms" in each:
                alone_ms = rendering[turn.answer_format]
                each["api_cpu_ms"] = _short(1e3 * load.cores["api"] / rate)
                each["render_share"] = _short(alone_ms / each["latency_ms"]["p50"])
                each["render_cpu_share"] = _short(alone_ms / each["api_cpu_ms"])
            reports.append(each)
    return reports


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _print(report: dict[str, Any]) -> None:
    """Print figures a line each, and loads as tables."""
    for name, value in report.items():
        if name not in _LOADS:
            print(f"{name:32} {_shown(value)}")
    for name in _LOADS:
        for each in report.get(name, []):
            print(f"\n{name} {each.get('format', 'json')}, {each['clients']} clients")
            for figure, value in each.items():
                if figure not in {"format", "clients"}:
                    print(f"  {figure:30} {_shown(value)}")


def _shown(value: object) -> object:
    if isinstance(value, list):
        return "{:g} ({:g} to {:g})".format(*value)
    return ", ".join(f"{k} {v:g}" for k, v in value.items()) if isinstance(value, dict) else value


if __name__ == "__main__":
    main()
