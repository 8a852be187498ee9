"""`layerstack export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from jobs.records import Compression
from jobs.tensors import DtypeName
from layerstack.cli.console import AsJson, ExitCode, out, print_json, progress, say
from layerstack.export import export as export_rows
from layerstack.exportoptions import ExportOptions, Naming, Target
from layerstack.rowtensors import Layout
from layerstack.scan import Parts
from layerstack.sources import open_source


def export(
    path: Annotated[str, typer.Argument(help="A part, a folder of parts, a job's folder, or a job's URL.")],
    to: Annotated[Target, typer.Option(help="safetensors: a file a prompt; dense-parquet: all rows of each.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the files; a second run goes on in it.")],
    layout: Annotated[Layout, typer.Option(help="own_rows leaves the constants out; safetensors only.")] = "dense",
    dtype: Annotated[DtypeName | None, typer.Option(help="Convert to; default as it is stored.")] = None,
    name: Annotated[Naming, typer.Option(help="What a safetensors file is called after.")] = "index",
    compression: Annotated[Compression, typer.Option(help="Of dense-parquet; zstd shrinks pad rows a lot.")] = "none",
    as_json: AsJson = False,
) -> None:
    """Write results for tools that know nothing of layerstack."""
    if to == "dense-parquet" and layout != "dense":
        raise typer.BadParameter("dense-parquet is dense; own rows are what a job's parts have", param_hint="--layout")
    if to == "dense-parquet" and name != "index":
        raise typer.BadParameter("dense-parquet has no file of a prompt", param_hint="--name")
    if to == "safetensors" and compression != "none":
        raise typer.BadParameter("safetensors files are not compressed", param_hint="--compression")
    options = ExportOptions(to=to, layout=layout, dtype=dtype, name=name, compression=compression)
    parts = Parts(open_source(path))
    with progress("prompts") as bar:
        task = bar.add_task("exporting", total=parts.num_rows)
        done = export_rows(parts, output, options, lambda rows: bar.advance(task, rows))
    if as_json:
        print_json({"to": to, "output": str(output), "rows": parts.num_rows} | asdict(done))
    else:
        out.print(str(output), soft_wrap=True, highlight=False, markup=False)
        say(f"{done.written:,} prompts written, {done.kept:,} were there, {done.failed:,} have no embedding")
    if done.overflowed:
        say(f"{done.overflowed:,} prompts have values that {dtype} cannot hold, and were left out", "red")
        raise typer.Exit(ExitCode.ANSWER_IS_NO)
