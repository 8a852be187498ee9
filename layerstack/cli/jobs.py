"""`layerstack jobs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from layerstack.cli.console import AsJson, Url, out, print_json, say
from layerstack.client import Client

jobs_app = typer.Typer(no_args_is_help=True, help="Long prompt lists, fetched later as Parquet.")


@jobs_app.command()
def submit(
    file: Annotated[Path, typer.Argument(help="Prompts: .txt, one a line, or .jsonl, .csv, .parquet.")],
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; default the encoder's.")] = None,
    layout: Annotated[str | None, typer.Option(help="own_rows (small, default) or dense.")] = None,
    compression: Annotated[str | None, typer.Option(help="none (default) or zstd.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Make a job of a prompt file; prints its id."""
    given = {"dtype": dtype, "layout": layout, "compression": compression}
    with Client(url) as client:
        job = client.submit(file, {name: value for name, value in given.items() if value is not None})
    if as_json:
        print_json(job)
    else:
        out.print(job.id)
        say(f"{job.num_prompts} prompts in {job.num_parts} parts; see `layerstack jobs show {job.id}`")


@jobs_app.command()
def show(job_id: str, url: Url = None, as_json: AsJson = False) -> None:
    """Tell how far a job got."""
    with Client(url) as client:
        job = client.job(job_id)
    if as_json:
        print_json(job)
        return
    out.print(f"{job.id}  {job.status}", highlight=False)
    out.print(f"{job.num_done} of {job.num_prompts} prompts, {job.num_parts_done} of {job.num_parts} parts")
    if job.num_failed is not None:
        out.print(f"{job.num_failed} failed, {job.num_truncated} truncated")
    if job.error:
        out.print(f"error: {job.error}", style="red", markup=False)


@jobs_app.command()
def cancel(job_id: str, url: Url = None) -> None:
    """Stop a job; what is done stays, and `retry` does the rest."""
    with Client(url) as client:
        out.print(client.cancel(job_id).status)


@jobs_app.command()
def retry(job_id: str, url: Url = None) -> None:
    """Do what is missing of a job that failed or was cancelled; check and repair one that succeeded."""
    with Client(url) as client:
        out.print(client.retry(job_id).status)


@jobs_app.command()
def delete(job_id: str, url: Url = None) -> None:
    """Delete a job and its results, at once and for good."""
    with Client(url) as client:
        client.delete(job_id)


@jobs_app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    after: Annotated[str | None, typer.Option(help="Jobs older than this id.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with Client(url) as client:
        found = client.jobs(limit=limit, after=after)
    if as_json:
        print_json(found)
        return
    table = Table("id", "made", "status", "prompts", box=None)
    for job in found:
        made = job.created_at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(job.id, made, job.status, f"{job.num_done} of {job.num_prompts}")
    out.print(table)


@jobs_app.command()
def fetch(
    job_id: str,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for manifest and parts.")],
    url: Url = None,
) -> None:
    """Download a finished job; parts that are there already stay."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Client(url) as client, Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("fetching", total=None)
        manifest = client.fetch(
            job_id,
            output,
            on_begin=lambda manifest: progress.update(task, total=manifest.bytes),
            on_part=lambda part: progress.advance(task, part.bytes),
        )
    out.print(str(output), soft_wrap=True)
    say(f"{manifest.rows} rows in {len(manifest.parts)} parts, {manifest.failed} of them failed")
