"""Writes the rows of a job for tools that know nothing of layerstack: a safetensors file a prompt, or dense Parquet.

In the folder:

    export.json               what it is an export of, and how; written first, so that the same command can go on
    00000123.safetensors      one a prompt: `prompt_embeds` and `text_ids`; what belongs to it as metadata
    index.jsonl               one line a prompt, failed ones included; written last
or
    parts/00000.parquet       as the parts of the source, in the layout `dense`; `layerstack.read` opens the folder
    parts/00000.json          what is in it; a part that has this is not written again
    manifest.json             written last

Not covered: rows of a source that changes meanwhile.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from jobs.files import remove_unfinished, written_whole
from jobs.parts import PartHeader
from jobs.records import Compression, Record, as_json
from jobs.tensors import DtypeName
from layerstack.errors import ExportError
from layerstack.exportoptions import Exported, ExportOptions, Naming, Target
from layerstack.exportparts import DenseParts
from layerstack.exportsurvey import Survey, needed_bytes, survey
from layerstack.exporttensors import TensorFiles
from layerstack.rowtensors import Layout
from layerstack.scan import Parts
from layerstack.sizes import size_text

_MARK = "export.json"


class ExportMark(Record):
    """`export.json`: what a folder is an export of. With another one, the folder is another export's."""

    version: Literal[1] = 1
    to: Target
    layout: Layout
    dtype: DtypeName
    name: Naming
    compression: Compression
    fingerprint: str
    source: str


def export(
    parts: Parts, folder: Path, options: ExportOptions, on_rows: Callable[[int], None] = lambda _: None
) -> Exported:
    """Write all rows of `parts` to `folder`. What an earlier call with the same arguments has finished stays.

    The folder's `index.jsonl` or `manifest.json` is there once all is done. Memory is that of a row group and a
    few prompts; with names by id, of all ids too. A part that a manifest lists is read twice: to be compared with its
    SHA-256 there, then row by row.

    Args:
        parts: what to export.
        folder: made if need be; empty, or that of the same export.
        options: how.
        on_rows: told how many prompts are done, as they are.

    Raises:
        ExportError: an id is no file name, the folder has something else in it, or too little room; nothing has been
            written then.
        PartFormatError: the dtype cannot hold the constant rows; the same.
        ReadError: a part is damaged; what has been written of others stays.
    """
    found = survey(parts, options)
    header = _header(parts.header, options)
    mark = _mark(header, options, found)
    _check_folder(folder, mark)
    _check_space(folder, needed_bytes(parts, found, header, options), options)
    _make_ready(folder, mark)
    if options.to == "safetensors":
        return TensorFiles(parts, folder, header, options).write(on_rows)
    return DenseParts(parts, folder, header, options.compression).write(found, on_rows)


def _header(header: PartHeader, options: ExportOptions) -> PartHeader:
    prefix_rows, pad_row = header.constant_rows()
    return PartHeader.build(
        layout="dense",
        dtype=options.dtype or header.dtype,
        max_length=header.max_length,
        fingerprint=header.fingerprint,
        layers=header.layers,
        prefix_rows=prefix_rows,
        pad_row=pad_row,
    )


def _mark(header: PartHeader, options: ExportOptions, found: Survey) -> ExportMark:
    return ExportMark(
        to=options.to,
        layout=options.layout,
        dtype=header.dtype,
        name=options.name,
        compression=options.compression,
        fingerprint=header.fingerprint,
        source=found.source,
    )


def _check_folder(folder: Path, mark: ExportMark) -> None:
    """Find out whether an export may be written to a folder.

    Raises:
        ExportError: no: it has something else in it.
    """
    path = folder / _MARK
    if not path.is_file():
        if folder.is_dir() and any(not each.name.startswith(".") for each in folder.iterdir()):
            raise ExportError(f"{folder} is not empty, and no export: name another folder")
        return
    try:
        found = ExportMark.model_validate_json(path.read_bytes())
    except ValidationError as exc:
        raise ExportError(f"{path} is damaged, or of another version of layerstack: name another folder") from exc
    differing = [
        f"{name} is {getattr(found, name)}, not {value}"
        for name, value in mark
        if name != "source" and getattr(found, name) != value
    ]
    if not differing and found.source != mark.source:
        differing = ["it has other rows"]
    if differing:
        raise ExportError(f"{folder} holds another export ({'; '.join(differing)}): name another folder")


def _check_space(folder: Path, needed: int, options: ExportOptions) -> None:
    existing = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    there = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file()) if folder.is_dir() else 0
    free = shutil.disk_usage(existing).free
    if needed - there > free:
        smaller = ", or export own rows (--layout own_rows), which are much less"
        is_smaller = options.to == "safetensors" and options.layout == "dense"
        raise ExportError(
            f"the export takes about {size_text(needed - there)}, and {existing} has {size_text(free)} free: "
            f"name a folder on another disk{smaller if is_smaller else ''}"
        )


def _make_ready(folder: Path, mark: ExportMark) -> None:
    """Remove what an export that was killed left, and write the mark."""
    for each in (folder, folder / "parts"):
        remove_unfinished(each)
    if not (folder / _MARK).exists():
        with written_whole(folder / _MARK) as file:
            file.write(as_json(mark))
