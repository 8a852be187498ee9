"""The command line.

Exit codes: 0 done; 1 it could not be done, and standard error says why and what to do next; 2 wrong usage.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
import typer
from pydantic import BaseModel, TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import layerstack
from jobs.errors import JobsError
from jobs.records import JobView
from jobs.settings import DEMO_MODEL, ApiKeys, load_settings
from jobs.tensors import save_tensors
from layerstack.client import DEFAULT_URL, KEY_VARIABLE, Client
from layerstack.errors import LayerstackError, LocalStackError, ServerError, ServerUnreachableError
from layerstack.mounted import model_to_serve

app = typer.Typer(
    no_args_is_help=True, help="Prompts in, FLUX.2 text conditioning out.", pretty_exceptions_enable=False
)
jobs_app = typer.Typer(no_args_is_help=True, help="Long prompt lists, fetched later as Parquet.")
app.add_typer(jobs_app, name="jobs")
keys_app = typer.Typer(no_args_is_help=True, help="Keys of callers, for a server that asks for them.")
app.add_typer(keys_app, name="keys")

_out = Console()
_err = Console(stderr=True, highlight=False)

_AFTER_401 = f"set {KEY_VARIABLE} to a key that whoever runs the server gave you"

Url = Annotated[str, typer.Option("--url", envvar="LAYERSTACK_URL", help="The server.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def main() -> None:
    """Run the command line, turning our errors into a line for the person who reads it."""
    try:
        app()
    except ServerUnreachableError as exc:
        _fail(f"{exc}; start a server with `layerstack up`, or name one with --url or LAYERSTACK_URL")
    except ServerError as exc:
        _fail(f"{exc}; {_AFTER_401}" if exc.status == httpx.codes.UNAUTHORIZED else str(exc))
    except (LayerstackError, JobsError) as exc:
        _fail(str(exc))
    except OSError as exc:
        _fail(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc))


def _fail(message: str) -> NoReturn:
    _say(f"error: {message}", "red")
    sys.exit(1)


def _say(message: str, style: str | None = None) -> None:
    try:
        _err.print(message, style=style, markup=False, soft_wrap=True)
    except OSError:  # the terminal has been closed, say: what is being done goes on, or ends in order
        # What could not be written would be tried again at the very end, and change the exit code to 120.
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives


@app.command()
def version() -> None:
    """Print the version."""
    _out.print(layerstack.__version__)


@app.command()
def up(
    port: Annotated[int | None, typer.Option(help="Port of the API; default LAYERSTACK_PORT or 7860.")] = None,
    storage: Annotated[str | None, typer.Option(help="Folder of the jobs; default LAYERSTACK_STORAGE.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of the model; default LAYERSTACK_MODEL, else the demo encoder.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Encoder preset; default LAYERSTACK_PRESET or flux2-dev.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device; default CUDA if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    attention: Annotated[str | None, typer.Option(help="auto, varlen or sdpa.")] = None,
) -> None:
    """Start everything on this machine: a broker, a worker and the API. Ctrl-C stops it all."""
    try:
        # What it needs comes with the extras 'api' and 'worker', which a client does without.
        from layerstack.local import LocalStack, StopRequest  # noqa: PLC0415
    except ImportError as exc:
        raise LocalStackError(f"{exc}; `layerstack up` needs: pip install 'layerstack[api,worker]'") from exc
    given = {
        "port": port,
        "storage": storage,
        "model": model,
        "preset": preset,
        "device": device,
        "dtype": dtype,
        "attention": attention,
    }
    settings = load_settings(**{name: value for name, value in given.items() if value is not None})
    settings = settings.model_copy(update={"model": model or model_to_serve(settings)})
    stop = StopRequest()
    with LocalStack(settings, _say) as stack:
        _say(f"layerstack {layerstack.__version__} on {stack.url}, docs at {stack.url}/docs")
        _say(f"jobs are kept in {stack.storage}; the model is {settings.model}")
        if settings.model == DEMO_MODEL:
            _say("no --model: this is the demo encoder, its weights are RANDOM, its embeddings mean nothing", "yellow")
        stack.run(stop)
        _say("stopping")
    _say("stopped")


@app.command()
def predict(
    prompts: Annotated[list[str], typer.Argument(help="One prompt or a few, each in quotes.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write a .safetensors file.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Encode a few prompts at once."""
    with Client(url) as client:
        answer = client.predict(prompts)
    summary: dict[str, Any] = {
        "prompt_embeds": list(answer.prompt_embeds.shape),
        "text_ids": list(answer.text_ids.shape),
        "dtype": answer.prompt_embeds.dtype.name,
        "num_tokens": answer.num_tokens,
        "truncated": answer.truncated,
        "fingerprint": answer.fingerprint,
    }
    if output is not None:
        tensors = {"prompt_embeds": answer.prompt_embeds, "text_ids": answer.text_ids}
        output.write_bytes(save_tensors(tensors, {"fingerprint": answer.fingerprint}))
        summary["output"] = str(output)
    if as_json:
        _print_json(summary)
    else:
        for name, value in summary.items():
            _out.print(f"{name:14} {value}", highlight=False)


@jobs_app.command()
def submit(
    file: Annotated[Path, typer.Argument(help="Prompts: .txt, one a line, or .jsonl, .csv, .parquet.")],
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; default the encoder's.")] = None,
    layout: Annotated[str | None, typer.Option(help="own_rows (small, default) or dense.")] = None,
    compression: Annotated[str | None, typer.Option(help="none (default) or zstd.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Make a job of a prompt file; prints its id."""
    given = {"dtype": dtype, "layout": layout, "compression": compression}
    with Client(url) as client:
        job = client.submit(file, {name: value for name, value in given.items() if value is not None})
    if as_json:
        _print_json(job)
    else:
        _out.print(job.id)
        _say(f"{job.num_prompts} prompts in {job.num_parts} parts; see `layerstack jobs show {job.id}`")


@jobs_app.command()
def show(job_id: str, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Tell how far a job got."""
    with Client(url) as client:
        job = client.job(job_id)
    if as_json:
        _print_json(job)
        return
    _out.print(f"{job.id}  {job.status}", highlight=False)
    _out.print(f"{job.num_done} of {job.num_prompts} prompts, {job.num_parts_done} of {job.num_parts} parts")
    if job.num_failed is not None:
        _out.print(f"{job.num_failed} failed, {job.num_truncated} truncated")
    if job.error:
        _out.print(f"error: {job.error}", style="red", markup=False)


@jobs_app.command()
def cancel(job_id: str, url: Url = DEFAULT_URL) -> None:
    """Stop a job; what is done stays, and `retry` does the rest."""
    with Client(url) as client:
        _out.print(client.cancel(job_id).status)


@jobs_app.command()
def retry(job_id: str, url: Url = DEFAULT_URL) -> None:
    """Do what is missing of a job that failed or was cancelled; check and repair one that succeeded."""
    with Client(url) as client:
        _out.print(client.retry(job_id).status)


@jobs_app.command()
def delete(job_id: str, url: Url = DEFAULT_URL) -> None:
    """Delete a job and its results, at once and for good."""
    with Client(url) as client:
        client.delete(job_id)


@jobs_app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    after: Annotated[str | None, typer.Option(help="Jobs older than this id.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with Client(url) as client:
        found = client.jobs(limit=limit, after=after)
    if as_json:
        _print_json(found)
        return
    table = Table("id", "made", "status", "prompts", box=None)
    for job in found:
        made = job.created_at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(job.id, made, job.status, f"{job.num_done} of {job.num_prompts}")
    _out.print(table)


@jobs_app.command()
def fetch(
    job_id: str,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for manifest and parts.")],
    url: Url = DEFAULT_URL,
) -> None:
    """Download a finished job; parts that are there already stay."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Client(url) as client, Progress(*columns, console=_err, transient=True) as progress:
        task = progress.add_task("fetching", total=None)
        manifest = client.fetch(
            job_id,
            output,
            on_begin=lambda manifest: progress.update(task, total=manifest.bytes),
            on_part=lambda part: progress.advance(task, part.bytes),
        )
    _out.print(str(output), soft_wrap=True)
    _say(f"{manifest.rows} rows in {len(manifest.parts)} parts, {manifest.failed} of them failed")


@keys_app.command()
def new(
    name: Annotated[str, typer.Argument(help="Who the key is for; jobs made with it belong to this name.")],
    as_json: AsJson = False,
) -> None:
    """Make a key, and the entry with which a server knows it. The key is shown this once and kept nowhere."""
    key = f"ls_{secrets.token_urlsafe(32)}"
    entry = f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"
    try:
        TypeAdapter(ApiKeys).validate_python(entry)
    except ValidationError as exc:
        raise typer.BadParameter(f"{name!r} is not a name of up to 64 of A-Z a-z 0-9 . _ -", param_hint="NAME") from exc
    if as_json:
        _print_json({"name": name, "key": key, "entry": entry})
        return
    _out.print(f"key    {key}\nentry  {entry}", highlight=False, soft_wrap=True)
    _say(f"add the entry to LAYERSTACK_API_KEYS of the server; the caller sets {KEY_VARIABLE} to the key")


def _print_json(value: dict[str, Any] | BaseModel | list[JobView]) -> None:
    def plain(each: Any) -> Any:  # noqa: ANN401 - JSON
        return each.model_dump(mode="json") if isinstance(each, BaseModel) else each

    print(json.dumps([plain(each) for each in value] if isinstance(value, list) else plain(value), indent=2))
