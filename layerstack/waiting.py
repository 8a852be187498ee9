"""The bar that shows how far a job is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from jobs.records import JobView

ShowWait = Callable[[JobView], None]
"""Told of a job whenever something in it has changed."""


@contextmanager
def show_wait(progress: bool | ShowWait | None) -> Iterator[ShowWait]:
    """Show a job while it is waited for: by a bar on standard error, by a function, or not at all."""
    if callable(progress):
        yield progress
        return
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda _job: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[tail]}"))
    with Progress(SpinnerColumn(), *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("waiting", total=None, tail="")

        def show(job: JobView) -> None:
            # The rate and the time left are the server's, which knows of all workers.
            bar.update(
                task,
                description=f"{job.id} {job.status}",
                completed=job.num_done,
                total=job.num_prompts,
                tail=progress_line(job),
            )

        yield show


def progress_line(job: JobView) -> str:
    """Return how far a job is in words."""
    words = [f"{job.num_done:,} of {job.num_prompts:,} prompts", f"{job.num_parts_done} of {job.num_parts} parts"]
    if job.rate is not None:
        words.append(f"{job.rate:,.1f}/s")
    if job.eta_s is not None:
        words.append(f"{timedelta(seconds=round(job.eta_s))} left")
    if job.queue_position:
        words.append(f"{job.queue_position} jobs before it")
    if job.num_failed:
        words.append(f"{job.num_failed:,} failed")
    return ", ".join(words)
