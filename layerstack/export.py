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

import hashlib
import json
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from jobs.files import remove_unfinished, sha256_of, written_whole
from jobs.layout import JobNames, part_index
from jobs.parts import MAX_LISTED_ERRORS, EncodedRow, PartHeader, PartWriter
from jobs.records import Manifest, PartReport, Record, as_json
from jobs.tensors import DTYPES, Array, DtypeName, dense_rows, safetensors_header, text_ids
from layerstack.errors import ExportError
from layerstack.scan import SMALL_COLUMNS, Parts, RowGroup
from layerstack.sizes import size_text
from layerstack.sources import PartFile

Target = Literal["dense-parquet", "safetensors"]
Layout = Literal["dense", "own_rows"]
Naming = Literal["index", "id"]
Compression = Literal["none", "zstd"]
NAME_RULE = (
    "1 to 128 of A-Z a-z 0-9 . _ -, not beginning with a dot, and no two the same, "
    "also where capital letters are not told from small ones"
)
_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")
_MARK, _INDEX = "export.json", "index.jsonl"
_ID_BYTES = 4 * np.dtype(np.int64).itemsize
# What the file system adds to a file, about: its last block, and its name.
_FILE_BYTES = 4096
# Most of the time for a small file is that the disk says it has it, which it says of several at once.
_WRITERS = 8
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


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


@dataclass(frozen=True)
class ExportOptions:
    """How rows are written.

    Attributes:
        to: which files.
        layout: of the tensors in safetensors files; Parquet is dense.
        dtype: None for that of the source.
        name: what a safetensors file is called after.
        compression: of Parquet.
    """

    to: Target
    layout: Layout = "dense"
    dtype: DtypeName | None = None
    name: Naming = "index"
    compression: Compression = "none"


@dataclass
class Exported:
    """What an export did. `overflowed` are those of `failed` whose values the dtype cannot hold."""

    written: int = 0
    kept: int = 0
    failed: int = 0
    overflowed: int = 0


@dataclass
class _Survey:
    """What the small columns tell: which source it is, and how much there is to write."""

    digest: Any = field(default_factory=hashlib.sha256)
    succeeded: int = 0
    tokens: int = 0
    last_index: int = -1
    names: set[str] = field(default_factory=set)

    @property
    def source(self) -> str:
        return str(self.digest.hexdigest())


def export(
    parts: Parts, folder: Path, options: ExportOptions, on_rows: Callable[[int], None] = lambda _: None
) -> Exported:
    """Write all rows of `parts` to `folder`. What an earlier call with the same arguments has finished stays.

    The folder's `index.jsonl` or `manifest.json` is there once all is done. Memory is that of a row group and a
    few prompts; with names by id, of all ids too.

    Args:
        parts: what to export.
        folder: made if need be; empty, or that of the same export.
        options: how.
        on_rows: told how many prompts are done, as they are.

    Raises:
        ExportError: an id is no file name, the folder has something else in it, or too little room; nothing has been
            written then.
        PartFormatError: the dtype cannot hold the constant rows; the same.
        ReadError: a part is damaged; what has been written stays.
    """
    survey = _surveyed(parts, options)
    header = _header(parts.header, options)
    mark = ExportMark(
        to=options.to,
        layout=options.layout,
        dtype=header.dtype,
        name=options.name,
        compression=options.compression,
        fingerprint=header.fingerprint,
        source=survey.source,
    )
    _check_folder(folder, mark)
    _check_space(folder, _needed_bytes(parts, survey, header, options))
    for each in (folder, folder / "parts"):
        remove_unfinished(each)
    if not (folder / _MARK).exists():
        with written_whole(folder / _MARK) as file:
            file.write(as_json(mark))
    if options.to == "safetensors":
        return _Tensors(parts, folder, header, options).write(on_rows)
    return _DenseParts(parts, folder, header, options.compression).write(survey, on_rows)


class _Tensors:
    """Writes a safetensors file a prompt."""

    def __init__(self, parts: Parts, folder: Path, header: PartHeader, options: ExportOptions) -> None:
        self._parts, self._folder, self._header, self._options = parts, folder, header, options
        self._prefix_rows, self._pad_row = header.constant_rows()  # (P, D), (D)
        self._done, self._pending = Exported(), deque[Future[None]]()

    def write(self, on_rows: Callable[[int], None]) -> Exported:
        with written_whole(self._folder / _INDEX) as index, ThreadPoolExecutor(_WRITERS) as self._pool:
            for group in self._parts.groups():
                for place in range(group.num_rows):
                    line = json.dumps(self._line(group, place), ensure_ascii=False)
                    index.write(line.encode() + b"\n")
                    self._await(_WRITERS)
                    on_rows(1)
            self._await(0)
        return self._done

    def _await(self, most: int) -> None:
        """Wait until at most so many files are being written."""
        while len(self._pending) > most:
            self._pending.popleft().result()
            self._done.written += 1

    def _line(self, group: RowGroup, place: int) -> dict[str, Any]:
        """Write a row's file, if it has one and that is not there -> what the index says of the row."""
        row = group.rows[place]
        line = {name: row[name] for name in ("index", "id", "prompt")}
        error = row["error"]
        if error is None:
            name = f"{row['id'] if self._options.name == 'id' else format(row['index'], '08d')}.safetensors"
            error = self._write(group, place, self._folder / name)
        if error is None:
            return line | {"file": name, "num_tokens": row["num_tokens"], "truncated": row["truncated"]}
        self._done.failed += 1
        return line | {"error": error}

    def _write(self, group: RowGroup, place: int, path: Path) -> str | None:
        """Write a file, unless it is there -> why it cannot be, if so."""
        row = group.rows[place]
        length = self._header.max_length
        if self._options.layout == "own_rows":
            length = group.num_own_rows(place)
        head = self._head(row, length)
        size = len(head) + length * (_ID_BYTES + self._header.embed_dim * DTYPES[self._header.dtype].itemsize)
        # A file of this name is whole, and of this export: its size is another only if somebody has touched it.
        if path.is_file() and path.stat().st_size == size:
            self._done.kept += 1
            return None
        rows = _cast(group.own_rows(place), self._header.dtype)
        if rows is None:
            self._done.overflowed += 1
            return f"the embedding has values that {self._header.dtype} cannot hold"
        if self._options.layout == "dense":
            rows = dense_rows(rows, prefix_rows=self._prefix_rows, pad_row=self._pad_row, max_length=length)
        stop = self._header.max_length
        pieces = (head, _raw(text_ids(stop - length, stop)), _raw(rows))
        self._pending.append(self._pool.submit(_write_file, path, pieces))
        return None

    def _head(self, row: dict[str, Any], length: int) -> bytes:
        metadata = {name: str(row[name]) for name in ("index", "id", "prompt", "num_tokens")}
        metadata |= {"truncated": str(row["truncated"]).lower(), "fingerprint": self._header.fingerprint}
        shapes = [
            ("text_ids", "int64", (length, 4)),  # first, so that each tensor lies at a multiple of its values' width
            ("prompt_embeds", self._header.dtype, (length, self._header.embed_dim)),
        ]
        return safetensors_header(shapes, metadata)


class _DenseParts:
    """Writes parts in the layout `dense`, of the same rows as those of the source."""

    def __init__(self, parts: Parts, folder: Path, header: PartHeader, compression: Compression) -> None:
        self._parts, self._names, self._header = parts, JobNames(str(folder)), header
        self._compression = compression
        self._done = Exported()

    def write(self, survey: _Survey, on_rows: Callable[[int], None]) -> Exported:
        reports = []
        for number, part in enumerate(self._parts.parts):
            report = self._found(_index_of(part.file, number))
            if report is None:
                report = self._write(number, _index_of(part.file, number), on_rows)
                self._done.written += report.part.succeeded
            else:
                self._done.kept += report.part.succeeded
                on_rows(part.num_rows)
            self._done.failed += report.part.failed
            reports.append(report)
        self._done.overflowed = survey.succeeded - self._done.written - self._done.kept
        with written_whole(Path(self._names.manifest)) as file:
            file.write(as_json(self._manifest(survey, reports)))
        return self._done

    def _found(self, index: int) -> PartReport | None:
        path, report = Path(self._names.part(index)), Path(self._names.report(index))
        try:
            found = PartReport.model_validate_json(report.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        return found if path.is_file() and path.stat().st_size == found.part.bytes else None

    def _write(self, number: int, index: int, on_rows: Callable[[int], None]) -> PartReport:
        path = Path(self._names.part(index))
        with written_whole(path) as file, PartWriter(file, self._header, self._compression) as writer:
            for row in self._rows(number):
                writer.write(row)
                on_rows(1)
        report = writer.counts.report(index, path.stat().st_size, sha256_of(path))
        with written_whole(Path(self._names.report(index))) as file:
            file.write(as_json(report))
        return report

    def _rows(self, number: int) -> Iterator[EncodedRow]:
        for group in self._parts.groups_of(number):
            for place, row in enumerate(group.rows):
                own_rows = group.own_rows(place) if row["error"] is None else None
                yield EncodedRow(own_rows=own_rows, **row)

    def _manifest(self, survey: _Survey, reports: list[PartReport]) -> Manifest:
        parts = [report.part for report in reports]
        return Manifest(
            job_id=_job_id(survey.source),
            fingerprint=self._header.fingerprint,
            finished_at=datetime.now(UTC),
            parts=parts,
            errors=[error for report in reports for error in report.errors][:MAX_LISTED_ERRORS],
            **{
                name: sum(getattr(part, name) for part in parts)
                for name in ("rows", "bytes", "succeeded", "failed", "truncated", "tokens")
            },
        )


def _index_of(part: PartFile, number: int) -> int:
    """Return which part of its job the one at place `number` is: an export of some parts keeps their names."""
    if part.summary is not None:
        return part.summary.index
    index = part_index(PurePosixPath(part.name).name)
    return number if index is None else index


def _surveyed(parts: Parts, options: ExportOptions) -> _Survey:
    """Read the small columns of all rows.

    Raises:
        ExportError: an id is no name for a file, though files are to be called after ids; or rows are out of order.
    """
    survey = _Survey()
    survey.digest.update(parts.header.model_dump_json().encode())
    for group in parts.groups():
        for batch in group.table.select(SMALL_COLUMNS).combine_chunks().to_batches():
            survey.digest.update(batch.serialize())
        survey.succeeded += group.table.column("error").null_count
        survey.tokens += sum(group.table.column("num_tokens").drop_null().to_pylist())
        for index in group.table.column("index").to_pylist():
            if index <= survey.last_index:
                raise ExportError(f"row {index} comes behind row {survey.last_index}: these parts are no one job's")
            survey.last_index = index
        if options.to == "safetensors" and options.name == "id":
            _check_names(group.table.column("id"), survey.names)
    return survey


def _check_names(ids: pa.ChunkedArray, names: set[str]) -> None:
    for id_ in ids.to_pylist():
        what = None if _NAME.fullmatch(id_) else "is no name for a file"
        if what is None and id_.lower() in names:
            what = "comes twice"
        if what is not None:
            raise ExportError(f"the id {id_!r} {what}; names by id need ids of {NAME_RULE}: export without --name id")
        names.add(id_.lower())


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


def _check_space(folder: Path, needed: int) -> None:
    existing = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    there = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file()) if folder.is_dir() else 0
    free = shutil.disk_usage(existing).free
    if needed - there > free:
        raise ExportError(
            f"the export takes about {size_text(needed - there)}, and {existing} has {size_text(free)} free: "
            "name a folder on another disk, or export own rows (--layout own_rows), which are much less"
        )


def _needed_bytes(parts: Parts, survey: _Survey, header: PartHeader, options: ExportOptions) -> int:
    """Return about how much is to be written. Compressed Parquet takes less."""
    row_bytes = header.embed_dim * DTYPES[header.dtype].itemsize + _ID_BYTES
    if options.to == "safetensors" and options.layout == "own_rows":
        own_rows = survey.tokens - survey.succeeded * len(header.constant_rows()[0])
        return own_rows * row_bytes + survey.succeeded * _FILE_BYTES
    if options.to == "dense-parquet" and options.compression != "none":
        return sum(part.bytes for part in parts.parts)  # at the least: how well pad rows compress is not known
    return survey.succeeded * (header.max_length * row_bytes + _FILE_BYTES)


def _cast(rows: Array, dtype: DtypeName) -> Array | None:
    """Return `rows` in a dtype; None if it cannot hold them. Rows in the source's own dtype are finite."""
    if rows.dtype == DTYPES[dtype]:
        return rows
    with np.errstate(over="ignore"):
        cast = rows.astype(DTYPES[dtype])
    return cast if np.isfinite(cast.astype(np.float32)).all() else None


def _write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    with written_whole(path) as file:
        for piece in pieces:
            file.write(piece)


def _raw(array: Array) -> memoryview:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data


def _job_id(source: str) -> str:
    """Return a ULID that the same rows always get: an export is no job, but a manifest names one."""
    number = int(source[:32], 16)
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))
