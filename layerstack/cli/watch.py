"""A job on the screen, as it is and while it goes on."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import UTC, datetime, timedelta

from pydantic import BaseModel
from rich import box
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jobs.records import JobStatus, JobView
from layerstack.cli.console import ExitCode, err, say
from layerstack.client import Client
from layerstack.waiting import progress_line

_COLOURS = {
    JobStatus.RUNNING: "cyan",
    JobStatus.SUCCEEDED: "green",
    JobStatus.FAILED: "red",
    JobStatus.PAUSED: "yellow",
    JobStatus.CANCELLING: "yellow",
    JobStatus.CANCELLED: "yellow",
}
_MOST_SQUARES = 48
_WIDTH = 76


def watch_job(client: Client, job_id: str, *, as_json: bool) -> int:
    """Show a job until its end -> the exit code.

    On a terminal it is one picture that changes; else a line whenever its status or a tenth of it is new. As JSON, a
    line for each event.
    """
    last: JobView | None = None
    is_drawn = err.is_terminal and not as_json
    with Live(console=err, refresh_per_second=8) if is_drawn else nullcontext() as live:
        for event in client.jobs.events(job_id):
            if as_json:
                print(json_line(event.kind, event.job or event.part), flush=True)
            elif live is not None and event.job is not None:
                live.update(show_job(event.job))
            elif event.job is not None and (last is None or _stage(event.job) != _stage(last)):
                say(f"{event.job.status}: {progress_line(event.job)}")
            last = None if event.kind == "deleted" else event.job or last
    if last is None:
        say(f"job {job_id} has been deleted", "yellow")
        return ExitCode.ANSWER_IS_NO
    if last.status is not JobStatus.SUCCEEDED:
        say(f"job {job_id} is {last.status}{f': {last.error}' if last.error else ''}", "red")
        say(f"what is done stays; `layerstack jobs retry {job_id}` does the rest")
        return ExitCode.ANSWER_IS_NO
    if not as_json:
        say(f"next: `layerstack jobs fetch {job_id} -o FOLDER`")
    return 0


def show_job(job: JobView) -> RenderableType:
    """Return a job as a panel."""
    colour = _COLOURS.get(job.status, "white")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    for name, value in _facts(job):
        facts.add_row(Text(name), Text(value) if isinstance(value, str) else value)
    bar = ProgressBar(
        total=max(1, job.num_prompts), completed=job.num_done, complete_style=colour, finished_style=colour
    )
    title = Text.assemble("job ", (job.id, "bold"), "  ", (f" {job.status} ", f"bold reverse {colour}"))
    return Panel(
        Group(bar, Text(), facts), title=title, title_align="left", box=box.ROUNDED, padding=(1, 2), width=_WIDTH
    )


def _facts(job: JobView) -> list[tuple[str, RenderableType]]:
    share = 100 * job.num_done // max(1, job.num_prompts)
    facts: list[tuple[str, RenderableType]] = [
        ("prompts", f"{job.num_done:,} of {job.num_prompts:,} ({share} %)"),
        ("parts", _squares(job)),
    ]
    if job.rate is not None:
        facts.append(("rate", f"{job.rate:,.1f} prompts/s"))
    if job.eta_s is not None:
        facts.append(("left", str(timedelta(seconds=round(job.eta_s)))))
    if job.queue_position is not None:
        facts.append(("queue", f"{job.queue_position} unfinished jobs were made before it"))
    if job.started_at is not None:
        facts.append(("took" if job.status.is_final else "runs for", _elapsed(job)))
    if job.num_failed is not None and job.num_truncated is not None:
        facts.append(("rows", f"{job.num_failed:,} failed, {job.num_truncated:,} truncated"))
    stored = f"{job.options.layout}, {job.options.dtype}, about {decimal(job.estimated_bytes)}"
    facts += [("results", stored), ("encoder", job.fingerprint)]
    facts += list(job.metadata.items())
    if job.error:
        facts.append(("error", Text(job.error, style="red")))
    return facts


def _squares(job: JobView) -> Text:
    """Return a square for each part, or for several of many."""
    count = min(job.num_parts, _MOST_SQUARES)
    done = count * job.num_parts_done // max(1, job.num_parts)
    failed = min(count - done, -(-count * job.num_parts_failed // max(1, job.num_parts)))
    return Text.assemble(
        f"{job.num_parts_done} of {job.num_parts}  ",
        ("■" * done, "green"),
        ("■" * failed, "red"),
        ("□" * (count - done - failed), "bright_black"),
    )


def _elapsed(job: JobView) -> str:
    begun = job.started_at or job.created_at
    return str(timedelta(seconds=round(((job.finished_at or datetime.now(UTC)) - begun).total_seconds())))


def _stage(job: JobView) -> tuple[JobStatus, int]:
    """Return what a line is printed for when it changes: the status, and the tenths that are done."""
    return job.status, 10 * job.num_done // max(1, job.num_prompts)


def json_line(event: str, content: BaseModel | None) -> str:
    """Return an event as a line of JSON."""
    body = "null" if content is None else content.model_dump_json()
    return f'{{"event": "{event}", "data": {body}}}'
