"""What is in parts, told from their footers and small columns; and one prompt's rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc

from jobs.parts import MAX_LISTED_ERRORS
from jobs.records import RowError, View
from jobs.tensors import DTYPES, Array, DtypeName
from layerstack.errors import ReadError, RowFailedError
from layerstack.scan import Parts, RowGroup

_COUNTED = ("num_tokens", "truncated", "error")
_TEXT_ID_BYTES = 4 * np.dtype(np.int64).itemsize


class Lengths(View):
    """How some lengths are distributed. 95 % of them are at most `p95`, which is one of them."""

    min: int
    median: float
    mean: float
    p95: int
    max: int

    @classmethod
    def of(cls, lengths: Array) -> Lengths | None:
        """Sum up `lengths`; None if there are none."""
        if not len(lengths):
            return None
        return cls(
            min=int(lengths.min()),
            median=float(np.median(lengths)),
            mean=round(float(lengths.mean()), 2),
            p95=p95_of(lengths),
            max=int(lengths.max()),
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
    """Count what is in `parts`, without reading an embedding; of dense parts, one is read.

    Args:
        parts: which.
        on_part: told of each part that has been counted.

    Raises:
        ReadError: a part is damaged; the message names it.
    """
    counts = _Counts()
    for number in range(len(parts.parts)):
        for group in parts.groups_of(number, _counted(parts)):
            counts.add(group, parts.num_own_rows(group))
        on_part()
    num_tokens = np.concatenate([np.empty(0, np.int32), *counts.num_tokens])
    return Inspection(_summary(parts, counts, num_tokens), num_tokens)


def p95_of(lengths: Array) -> int:
    """Return the least of `lengths`, one at least, that 95 % of them are not above."""
    return int(np.percentile(lengths, 95, method="inverted_cdf"))


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


@dataclass
class _Counts:
    """What has been counted so far: arrays of lengths, a row group each, and numbers of rows."""

    num_tokens: list[Array] = field(default_factory=list)
    own_rows: list[Array] = field(default_factory=list)
    truncated: int = 0
    failed: int = 0
    errors: list[RowError] = field(default_factory=list)

    def add(self, group: RowGroup, own_rows: Array) -> None:
        self.num_tokens.append(group.table.column("num_tokens").drop_null().to_numpy())
        self.own_rows.append(own_rows)
        self.truncated += pc.sum(group.table.column("truncated")).as_py() or 0
        self.failed += group.num_rows - group.table.column("error").null_count
        if len(self.errors) < MAX_LISTED_ERRORS:
            self.errors += _errors(group)[: MAX_LISTED_ERRORS - len(self.errors)]


def _counted(parts: Parts) -> list[str]:
    return sorted({*_COUNTED, *parts.length_columns})


def _summary(parts: Parts, counts: _Counts, num_tokens: Array) -> Summary:
    header = parts.header
    size, dense_size = sum(part.bytes for part in parts.parts), len(num_tokens) * _dense_bytes(parts)
    return Summary(
        path=parts.source.where,
        columns={column.name: str(column.type) for column in parts.schema},
        **header.model_dump(include={"schema_version", "layout", "dtype", "fingerprint", "layers"}),
        compression=parts.compression,
        embed_dim=header.embed_dim,
        max_length=header.max_length,
        num_prefix_rows=len(parts.prefix_rows),
        parts=len(parts.parts),
        rows=parts.num_rows,
        succeeded=len(num_tokens),
        failed=counts.failed,
        truncated=counts.truncated,
        tokens=int(num_tokens.sum()),
        num_tokens=Lengths.of(num_tokens),
        own_rows=Lengths.of(np.concatenate([np.empty(0, np.int32), *counts.own_rows])),
        bytes=size,
        dense_bytes=dense_size,
        times_smaller=round(dense_size / size, 2) if dense_size else None,
        errors=counts.errors,
    )


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


def _first_success(parts: Parts) -> int:
    start = 0
    for group in parts.groups(("error",)):
        succeeded = np.flatnonzero(pc.is_null(group.table.column("error")).to_numpy())
        if len(succeeded):
            return start + int(succeeded[0])
        start += group.num_rows
    raise ReadError(f"none of the {start} rows has an embedding")
