"""What all commands share: where they print, how progress looks, what ends them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from layerstack.address import URL_VARIABLE
from layerstack.client import Client

out = Console()
err = Console(stderr=True, highlight=False)

Url = Annotated[str | None, typer.Option("--url", envvar=URL_VARIABLE, help="The server.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


class ExitCode(IntEnum):
    """What a command ends with; `layerstack/cli/__init__.py` and `docs/command-line.md` list them."""

    FAILED = 1
    """It could not be done."""
    USAGE = 2
    """Wrong usage."""
    NO_SERVER = 3
    """No server answers, or it has no worker yet."""
    ANSWER_IS_NO = 4
    """Done, and the answer is no."""
    INTERRUPTED = 130
    """Ctrl-C."""


def say(message: str, style: str | None = None) -> None:
    """Tell the person who runs the command, on standard error."""
    try:
        err.print(message, style=style, markup=False, soft_wrap=True)
    except OSError:  # the terminal has been closed, say: what is being done goes on, or ends in order
        # What could not be written would be tried again at the very end, and change the exit code to 120.
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives


def print_json(value: BaseModel | Mapping[str, Any] | Sequence[BaseModel | Mapping[str, Any]]) -> None:
    """Print one JSON document on standard output."""

    def plain(each: Any) -> Any:  # noqa: ANN401 - JSON
        return each.model_dump(mode="json") if isinstance(each, BaseModel) else each

    print(json.dumps([plain(each) for each in value] if isinstance(value, Sequence) else plain(value), indent=2))


def print_line(text: str) -> None:
    """Print a line of text as it is, on standard output: an id or a path that a program may take."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def print_fields(fields: Mapping[str, Any]) -> None:
    """Print names and values, one a line."""
    width = max(map(len, fields)) + 2
    for name, value in fields.items():
        out.print(f"{name:{width}}{value}", highlight=False, markup=False, soft_wrap=True)


def chosen(**options: Any) -> dict[str, Any]:  # noqa: ANN401 - options of any type
    """Return the options that were given."""
    return {name: value for name, value in options.items() if value is not None}


class RateColumn(ProgressColumn):
    """How many a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """Return the rate of a task, once there is one."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {self._unit}/s", style="progress.data.speed")


def progress(unit: str) -> Progress:
    """Return a bar with count, rate and time left, on standard error; nothing is drawn where that is no terminal."""
    return _bar(TextColumn("{task.completed:,.0f} of {task.total:,.0f}"), RateColumn(unit))


def byte_progress() -> Progress:
    """Return a bar with bytes, their rate and the time left; likewise."""
    return _bar(DownloadColumn(), TransferSpeedColumn())


def _bar(*columns: ProgressColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


def connect(url: str | None) -> Client:
    """Return a client that says so when it waits for a server that is busy."""
    return Client(url, on_retry=lambda exc, wait_s: say(f"{exc}; trying again in {wait_s:.0f} s", "yellow"))
