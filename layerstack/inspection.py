"""What is in parts, told from their footers and small columns; and whether they are what the manifest says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow.compute as pc

from jobs.layout import JobNames
from jobs.parts import MAX_LISTED_ERRORS
from jobs.records import Manifest, PartSummary, RowError, View
from jobs.tensors import DTYPES, Array, DtypeName
from layerstack.errors import ReadError, RowFailedError
from layerstack.scan import Parts, RowGroup
from layerstack.sources import PartFile, Source, open_source, parsed

_COUNTED = ("num_tokens", "truncated", "error")
_TEXT_ID_BYTES = 4 * np.dtype(np.int64).itemsize
_PIECE_BYTES = 2**20


class Lengths(View):
    """How some lengths are distributed."""

    min: int
    median: float
    mean: float
    p95: float
    max: int

    @classmethod
    def of(cls, lengths: Array) -> Lengths | None:
        """Sum up `lengths`; None if there are none."""
        if not len(lengths):
            return None
        median, p95 = np.percentile(lengths, [50, 95])
        return cls(
            min=int(lengths.min()), median=median, mean=round(float(lengths.mean()), 2), p95=p95, max=int(lengths.max())
        )


class Summary(View):
    """What is in parts. `embed_dim` is D, `max_length` is L, `num_prefix_rows` is P."""

    path: str
    columns: dict[str, str]
    schema_version: int
    layout: str
    dtype: DtypeName
    compression: str
    fingerprint: str
    layers: tuple[int, ...]
    embed_dim: int
    max_length: int
    num_prefix_rows: int
    parts: int
    rows: int
    succeeded: int
    failed: int
    truncated: int
    tokens: int
    num_tokens: Lengths | None
    own_rows: Lengths | None
    bytes: int
    dense_bytes: int
    times_smaller: float | None
    errors: list[RowError]


class DamagedPart(View):
    """A part that is not what the manifest says."""

    part: str
    reason: str


@dataclass(frozen=True)
class PartToVerify:
    """A part, what the manifest says of it, and how to open it."""

    name: str
    summary: PartSummary
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True, eq=False)
class Inspection:
    """What has been found.

    Attributes:
        summary: in numbers.
        num_tokens: of each prompt that succeeded, int32, in order.
    """

    summary: Summary
    num_tokens: Array


@dataclass(frozen=True, eq=False)
class StoredPrompt:
    """One prompt with its own rows `[n, D]`."""

    position: int
    index: int
    id: str
    prompt: str
    num_tokens: int
    truncated: bool
    own_rows: Array


def inspect_parts(parts: Parts, on_part: Callable[[], None] = lambda: None) -> Inspection:
    """Count what is in `parts`, without reading an embedding.

    Args:
        parts: which.
        on_part: told of each part that has been counted.

    Raises:
        ReadError: a part is damaged; the message names it.
    """
    header = parts.header
    lengths, truncated, failed, errors = [np.empty(0, np.int32)], 0, 0, list[RowError]()
    for number in range(len(parts.parts)):
        for group in parts.groups_of(number, _COUNTED):
            lengths.append(group.table.column("num_tokens").drop_null().to_numpy())
            truncated += pc.sum(group.table.column("truncated")).as_py() or 0
            failed += group.num_rows - group.table.column("error").null_count
            if len(errors) < MAX_LISTED_ERRORS:
                errors += _errors(group)[: MAX_LISTED_ERRORS - len(errors)]
        on_part()
    num_tokens = np.concatenate(lengths)
    size = sum(part.bytes for part in parts.parts)
    dense_size = len(num_tokens) * _dense_bytes(parts)
    num_prefix_rows = len(header.constant_rows()[0])
    summary = Summary(
        path=parts.source.where,
        columns={field.name: str(field.type) for field in parts.schema},
        **header.model_dump(include={"schema_version", "layout", "dtype", "fingerprint", "layers"}),
        compression=parts.compression,
        embed_dim=header.embed_dim,
        max_length=header.max_length,
        num_prefix_rows=num_prefix_rows,
        parts=len(parts.parts),
        rows=parts.num_rows,
        succeeded=len(num_tokens),
        failed=failed,
        truncated=truncated,
        tokens=int(num_tokens.sum()),
        num_tokens=Lengths.of(num_tokens),
        own_rows=Lengths.of(_num_own_rows(parts, num_tokens, num_prefix_rows)),
        bytes=size,
        dense_bytes=dense_size,
        times_smaller=round(dense_size / size, 2) if dense_size else None,
        errors=errors,
    )
    return Inspection(summary, num_tokens)


def read_prompt(parts: Parts, position: int | None = None) -> StoredPrompt:
    """Read one prompt and its rows.

    Args:
        parts: where.
        position: among all rows; default the first that succeeded.

    Raises:
        RowFailedError: the row was not encoded.
        ReadError: there is no such row, or none that succeeded, or the part is damaged.
    """
    if position is None:
        position = _first_success(parts)
    if not 0 <= position < parts.num_rows:
        raise ReadError(f"there is no row {position}: the rows are 0 to {parts.num_rows - 1}")
    group, place = parts.group_with(position)
    row = group.rows[place]
    if row["error"] is not None:
        raise RowFailedError(row["index"], row["error"])
    return StoredPrompt(
        position=position,
        **{name: row[name] for name in ("index", "id", "prompt", "num_tokens", "truncated")},
        own_rows=group.own_rows(place),
    )


def parts_to_verify(path: str) -> list[PartToVerify]:
    """Return the parts that a path or URL means, as their manifest lists them. Whether they are there is not known yet.

    Raises:
        ReadError: there is no manifest, or it cannot be read.
        ServerError, ServerUnreachableError: of a server's job, as `layerstack.read` raises them.
    """
    local = Path(path).expanduser()
    if not local.exists():
        source = open_source(path)
        parts = [(part, part.summary) for part in source.parts]
        if any(summary is None for _, summary in parts):
            raise ReadError(f"{path} has no manifest to compare with: name the job's folder")
        return [PartToVerify(part.name, summary, partial(_open, source, part)) for part, summary in parts if summary]
    for folder in (local, local.absolute().parent, local.absolute().parent.parent):
        names = JobNames(str(folder))
        if Path(names.manifest).is_file():
            manifest = parsed(Path(names.manifest).read_bytes(), Manifest, names.manifest)
            paths = [(Path(names.part(part.index)), part) for part in manifest.parts]
            wanted = [each for each in paths if local.is_dir() or each[0].name == local.name]
            return [PartToVerify(part.name, summary, partial(_open_file, part)) for part, summary in wanted]
    raise ReadError(f"{path} has no manifest.json, so there are no sums to compare its parts with")


def damaged_parts(parts: Iterable[PartToVerify], on_bytes: Callable[[int], None] = lambda _: None) -> list[DamagedPart]:
    """Read parts whole, and compare size and SHA-256 with those of the manifest.

    Args:
        parts: which.
        on_bytes: told of bytes as they have been read.
    """
    wrong = ((part, _what_is_wrong(part, on_bytes)) for part in parts)
    return [DamagedPart(part=part.name, reason=reason) for part, reason in wrong if reason is not None]


def _errors(group: RowGroup) -> list[RowError]:
    """Return the rows of a group that failed. Only then their ids are read: there are none in most groups."""
    reasons = group.table.column("error")
    if reasons.null_count == group.num_rows:
        return []
    columns: list[list[Any]] = [group.column("index").to_pylist(), group.column("id").to_pylist(), reasons.to_pylist()]
    return [
        RowError(index=index, id=id_, error=error)
        for index, id_, error in zip(*columns, strict=True)
        if error is not None
    ]


def _dense_bytes(parts: Parts) -> int:
    """Bytes of one dense prompt: `[L, D]` values and `[L, 4]` text ids."""
    header = parts.header
    return header.max_length * (header.embed_dim * DTYPES[header.dtype].itemsize + _TEXT_ID_BYTES)


def _num_own_rows(parts: Parts, num_tokens: Array, num_prefix_rows: int) -> Array:
    """Return how many own rows each prompt has: its tokens behind the prefix, and pad rows if they follow the prompt.

    Which it is, one prompt's number of text ids tells, as those stand for stored rows.
    """
    header, own = parts.header, num_tokens - num_prefix_rows
    if header.layout == "own_rows" and len(own):
        for group in parts.groups(("num_tokens",)):
            lengths = pc.list_value_length(group.column("text_ids")).drop_null()
            if len(lengths):
                first = lengths[0].as_py()
                return own if first == own[0] else np.full_like(own, first)
    return own


def _first_success(parts: Parts) -> int:
    start = 0
    for group in parts.groups(("error",)):
        succeeded = np.flatnonzero(pc.is_null(group.table.column("error")).to_numpy())
        if len(succeeded):
            return start + int(succeeded[0])
        start += group.num_rows
    raise ReadError(f"none of the {start} rows has an embedding")


def _what_is_wrong(part: PartToVerify, on_bytes: Callable[[int], None]) -> str | None:
    digest, size = hashlib.sha256(), 0
    try:
        with part.open() as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
                size += len(piece)
                on_bytes(len(piece))
    except FileNotFoundError:
        return "it is missing"
    except OSError as exc:
        return f"it cannot be read: {exc.strerror}"
    if size != part.summary.bytes:
        return f"it has {size} bytes, and {part.summary.bytes} by the manifest"
    return None if digest.hexdigest() == part.summary.sha256 else "its SHA-256 is not the manifest's"


def _open_file(path: Path) -> IO[bytes]:
    return path.open("rb")


def _open(source: Source, part: PartFile) -> IO[bytes]:
    found = source.open(part)
    return found.open("rb") if isinstance(found, Path) else found
