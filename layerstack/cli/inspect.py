"""`layerstack inspect`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from jobs.tensors import DTYPES
from layerstack import plots
from layerstack.cli.console import AsJson, ExitCode, byte_progress, out, print_fields, print_json, progress, say
from layerstack.errors import TokensError
from layerstack.inspection import Inspection, Lengths, StoredPrompt, Summary, inspect_parts, read_prompt
from layerstack.partsums import DamagedPart, PartsToVerify, damaged_parts, parts_to_verify
from layerstack.scan import Parts
from layerstack.sizes import count_text, size_text
from layerstack.sources import open_source
from layerstack.tokens import prompt_tokens

_SHOWN_ERRORS = 10
_BAR_FROM_PARTS = 50


def inspect(
    path: Annotated[str, typer.Argument(help="A part, a folder of parts, a job's folder, or a job's URL.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare each part with its SHA-256, too.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw lengths and one prompt's rows: .png, .svg or .pdf.")] = None,
    prompt: Annotated[
        int | None, typer.Option(help="Which row to draw, counted from 0; default the first that succeeded.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(envvar="LAYERSTACK_MODEL", help="Folder or hub id of the tokenizer; default the demo encoder's."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what is in the results of a job, and how much smaller they are than dense tensors."""
    if plot is not None and plot.suffix.lower() not in plots.SUFFIXES:
        raise typer.BadParameter(f"{plot} ends in none of {', '.join(plots.SUFFIXES)}", param_hint="--plot")
    if prompt is not None and plot is None:
        raise typer.BadParameter("it chooses the row that --plot draws: give that too", param_hint="--prompt")
    damaged = _verified(path, as_json=as_json) if verify else None
    parts, found = _inspected(path)
    if plot is not None:
        _draw(plot, found, read_prompt(parts, prompt), model)
    if as_json:
        print_json(found.summary.model_dump(mode="json") | {"damaged": damaged, "plot": plot and str(plot)})
        return
    _print_summary(found.summary)
    if damaged is not None:
        out.print("every part is what the manifest says", style="green")
    if plot is not None:
        say(f"drawn to {plot}")


def _inspected(path: str) -> tuple[Parts, Inspection]:
    source = open_source(path)
    # Both passes read a few kilobytes of each part, so a few parts take no time that would be worth a bar.
    with progress("parts") as bar:
        task = bar.add_task("reading", total=2 * len(source.parts), visible=len(source.parts) >= _BAR_FROM_PARTS)
        parts = Parts(source, lambda: bar.advance(task))
        return parts, inspect_parts(parts, lambda: bar.advance(task))


def _verified(path: str, *, as_json: bool) -> list[DamagedPart]:
    """Compare parts with their manifest; if some differ, the command ends here. So the list is empty."""
    found = parts_to_verify(path)
    with byte_progress() as bar:
        task = bar.add_task("verifying", total=found.bytes)
        damaged = damaged_parts(found, lambda size: bar.advance(task, size))
    if damaged:
        _print_damaged(path, found, damaged, as_json=as_json)
        raise typer.Exit(ExitCode.ANSWER_IS_NO)
    return damaged


def _draw(plot: Path, found: Inspection, prompt: StoredPrompt, model: str | None) -> None:
    summary = found.summary
    count = min(len(prompt.own_rows), prompt.num_tokens - summary.num_prefix_rows)
    note = ""
    try:
        labels = prompt_tokens(prompt.prompt, summary.layers, model)
        if prompt.truncated:  # what its rows end before
            labels = labels[:count]
        if len(labels) != count:
            note = f"the tokenizer makes {len(labels)} tokens of this prompt, its rows are {count}"
    except TokensError as exc:
        labels, note = [], str(exc)
    if note:
        labels = [str(position) for position in range(count)]
        note = f"Rows are numbered: {note}. --model names the tokenizer."
        say(note, "yellow")
    plots.draw(plot, summary, found.num_tokens, prompt, labels, note)


def _print_damaged(path: str, found: PartsToVerify, damaged: list[DamagedPart], *, as_json: bool) -> None:
    if as_json:
        print_json({"path": path, "damaged": [part.model_dump() for part in damaged]})
    for part in damaged:
        what = "does not belong there" if part.part in found.unknown else "is damaged"
        say(f"{part.part} {what}: {part.reason}", "red")
    if listed := len(damaged) - len(found.unknown):
        verb = "is" if listed == 1 else "are"
        say(f"{count_text(listed, 'part')} {verb} not what the manifest says; {found.repair}")
    if found.unknown:
        say(f"{count_text(len(found.unknown), 'part')} of another job, it seems: move them out of the folder")


def _print_summary(summary: Summary) -> None:
    hidden = summary.embed_dim // len(summary.layers)
    item_size = DTYPES[summary.dtype].itemsize
    fields = {
        "path": summary.path,
        "parts": f"{summary.parts:,}, {size_text(summary.bytes)}, compression {summary.compression}",
        "layout": f"{summary.layout}, {summary.dtype}, schema version {summary.schema_version}",
        "fingerprint": summary.fingerprint,
        "layers": ", ".join(map(str, summary.layers)),
        "shape": f"L = {summary.max_length:,} rows a prompt, P = {summary.num_prefix_rows} of them the prefix; "
        f"D = {summary.embed_dim:,} = {len(summary.layers)} x {hidden:,} values a row, "
        f"{size_text(summary.embed_dim * item_size)}",
        "rows": f"{summary.rows:,}, {summary.failed:,} failed, {summary.truncated:,} truncated",
        "tokens": f"{summary.tokens:,}",
    }
    print_fields(fields)
    if summary.num_tokens is not None and summary.own_rows is not None:
        out.print(_lengths_table({"tokens": summary.num_tokens, "own rows": summary.own_rows}))
    if summary.times_smaller is not None:
        smaller = f"{summary.times_smaller:,.1f} times as much"
        print_fields({"on disk": size_text(summary.bytes), "dense": f"{size_text(summary.dense_bytes)}, {smaller}"})
    columns = Table("column", "type", box=None, title_justify="left", pad_edge=False)
    for name, kind in summary.columns.items():
        columns.add_row(name, kind)
    out.print("", columns, sep="\n")
    if summary.errors:
        _print_errors(summary)


def _lengths_table(lengths: dict[str, Lengths]) -> Table:
    table = Table("", *(["min", "median", "mean", "p95", "max"]), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, each in lengths.items():
        table.add_row(name, *(f"{value:,.1f}".removesuffix(".0") for value in each.model_dump().values()))
    return table


def _print_errors(summary: Summary) -> None:
    shown = summary.errors[:_SHOWN_ERRORS]
    of_all = "" if len(shown) == summary.failed else f", the first {len(shown)} of {summary.failed:,}"
    out.print(f"\nrows that failed{of_all}:", style="red", highlight=False)
    width = int(math.log10(max(1, shown[-1].index))) + 1
    for row in shown:
        out.print(f"{row.index:>{width}}  id {row.id}: {row.error}", markup=False, highlight=False, soft_wrap=True)
