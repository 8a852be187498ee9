"""`layerstack jobs`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from jobs.records import JobStatus, JobView
from layerstack.cli.console import (
    AsJson,
    ExitCode,
    Url,
    byte_progress,
    chosen,
    connect,
    out,
    print_json,
    print_line,
    say,
)
from layerstack.cli.watch import json_line, show_job, watch_job
from layerstack.client import Client
from layerstack.download import DownloadProgress
from layerstack.sizes import count_text
from layerstack.submission import Prompts

jobs_app = typer.Typer(no_args_is_help=True, help="Long prompt lists, fetched later as Parquet.")

JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]
JobOrNewest = Annotated[str | None, typer.Argument(metavar="[JOB]", help="The job's id; default the newest job.")]


@jobs_app.command()
def submit(
    file: Annotated[Path, typer.Argument(help="Prompts: .txt, one a line, or .jsonl, .csv, .parquet; - reads lines.")],
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; default the encoder's.")] = None,
    layout: Annotated[str | None, typer.Option(help="own_rows (small, default) or dense.")] = None,
    compression: Annotated[str | None, typer.Option(help="none (default) or zstd.")] = None,
    chunk_rows: Annotated[int | None, typer.Option(help="Prompts in a part, at most.")] = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Rows stored in a part, at most, as estimated.")] = None,
    on_error: Annotated[str | None, typer.Option(help="A prompt that fails: continue (default), or fail.")] = None,
    deduplicate: Annotated[bool, typer.Option(help="Encode prompts that are the same once.")] = True,
    metadata: Annotated[list[str] | None, typer.Option(help="NAME=TEXT, kept with the job; may be repeated.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show how far it is, until its end.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Make a job of a prompt file; prints its id."""
    options = chosen(
        dtype=dtype,
        layout=layout,
        compression=compression,
        chunk_rows=chunk_rows,
        chunk_tokens=chunk_tokens,
        on_error=on_error,
        deduplicate=deduplicate,
    )
    prompts: Prompts = _lines_of_standard_input() if str(file) == "-" else file
    with connect(url) as client:
        job = client.jobs.submit(prompts, options, metadata=_named(metadata or [])).view
        if as_json and watch:  # a line each, as of the events that follow
            print(json_line("submitted", job), flush=True)
        elif as_json:
            print_json(job)
        else:
            print_line(job.id)
            size = f"{count_text(job.num_prompts, 'prompt')} in {count_text(job.num_parts, 'part')}"
            say(f"{size}; next: `layerstack jobs watch {job.id}`")
        if watch:
            raise typer.Exit(watch_job(client, job.id, as_json=as_json))


@jobs_app.command()
def show(job: JobOrNewest = None, url: Url = None, as_json: AsJson = False) -> None:
    """Tell how far a job got."""
    with connect(url) as client:
        found = client.jobs.view(_id(client, job))
    if as_json:
        print_json(found)
    else:
        out.print(show_job(found))


@jobs_app.command()
def watch(job: JobOrNewest = None, url: Url = None, as_json: AsJson = False) -> None:
    """Show how far a job is until its end. Exit code 0 if it succeeded, else 4. Ctrl-C stops only the watching."""
    with connect(url) as client:
        raise typer.Exit(watch_job(client, _id(client, job), as_json=as_json))


@jobs_app.command()
def cancel(job: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Stop a job; what is done stays, and `retry` does the rest."""
    with connect(url) as client:
        _print_status(client.jobs.cancel(job), as_json=as_json)


@jobs_app.command()
def retry(job: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Do what is missing of a job that failed or was cancelled; check and repair one that succeeded."""
    with connect(url) as client:
        _print_status(client.jobs.retry(job), as_json=as_json)


@jobs_app.command()
def delete(job: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Delete a job and its results, at once and for good."""
    with connect(url) as client:
        client.jobs.delete(job)
    if as_json:
        print_json({"id": job, "deleted": True})
    else:
        say(f"job {job} and its results are deleted")


@jobs_app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, help="Jobs, at most.")] = 20,
    after: Annotated[str | None, typer.Option(help="Jobs older than this id.")] = None,
    status: Annotated[list[JobStatus] | None, typer.Option(help="In this status; may be repeated.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with connect(url) as client:
        found = client.jobs.list(limit=limit, after=after, status=status or [])
    if as_json:
        print_json(found)
        return
    if not found:
        say("no jobs; `layerstack jobs submit FILE` makes one")
        return
    table = Table(box=None)
    for name in ("id", "made", "status", "prompts"):
        table.add_column(name, no_wrap=True, overflow="ignore")
    for job in found:
        made = job.created_at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(job.id, made, job.status, f"{job.num_done:,} of {job.num_prompts:,}")
    out.print(table)


@jobs_app.command()
def fetch(
    job: JobOrNewest = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for manifest and parts; default the job's id.")
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Download a finished job. Parts that are there already stay, and one that broke off goes on where it stopped."""
    with connect(url) as client, byte_progress() as bar:
        job_id = _id(client, job)
        folder = output or Path(job_id)
        task = bar.add_task("fetching", total=None)

        def show_progress(now: DownloadProgress) -> None:
            bar.update(
                task,
                description=f"part {now.parts_done} of {now.parts}",
                completed=now.bytes_done,
                total=now.bytes,
            )

        manifest = client.jobs.download(job_id, folder, on_progress=show_progress)
    if as_json:
        print_json({"folder": str(folder), **manifest.model_dump(mode="json", exclude={"parts", "errors"})})
        return
    print_line(str(folder))
    say(
        f"{count_text(manifest.rows, 'row')} in {count_text(len(manifest.parts), 'part')}, "
        f"{manifest.failed} of them failed"
    )
    say(f"next: `layerstack inspect {folder}`, or in Python layerstack.read({str(folder)!r})")


def _id(client: Client, job: str | None) -> str:
    if job is not None:
        return job
    newest = client.jobs.list(limit=1)
    if not newest:
        say("error: the server has no jobs; `layerstack jobs submit FILE` makes one", "red")
        raise typer.Exit(ExitCode.FAILED)
    return newest[0].id


def _print_status(job: JobView, *, as_json: bool) -> None:
    if as_json:
        print_json(job)
    else:
        print_line(job.status)


def _named(metadata: list[str]) -> dict[str, str]:
    for word in metadata:
        if "=" not in word:
            raise typer.BadParameter(f"{word!r} is not NAME=TEXT", param_hint="--metadata")
    return dict(word.split("=", 1) for word in metadata)


def _lines_of_standard_input() -> Iterator[str]:
    for line in sys.stdin:
        yield line.removesuffix("\n").removesuffix("\r")
