"""The Parquet of a job: prompts that wait, and parts that are done. `docs/file-format.md` describes it for readers."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from jobs.errors import PartFormatError, RecordFormatError
from jobs.records import Compression, Layout, PartReport, PartSummary, Prompt, Record, RowError
from jobs.tensors import DTYPES, Array, DtypeName, dense_rows, text_ids

HEADER_KEY = b"layerstack"
# A reader that wants one row decodes its row group, so these stay small; too small, and the overhead shows. What fits
# into a core's cache is also written fastest: 1240 MB/s of PartiPrompts, against 440 with 16 MiB and 520 with 1/4 MiB.
ROW_GROUP_BYTES = 2**20
MAX_LISTED_ERRORS = 1000

_PROMPTS_AT_ONCE = 1024

PROMPT_SCHEMA = pa.schema([("index", pa.int64()), ("id", pa.string()), ("prompt", pa.string())])
PART_SCHEMA = pa.schema(
    [
        *PROMPT_SCHEMA,
        ("prompt_embeds", pa.large_binary()),
        ("text_ids", pa.list_(pa.list_(pa.int64(), 4))),
        ("num_tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("error", pa.string()),
    ]
)


class PartHeader(Record):
    """Metadata of a part's file, under the key `layerstack`: all that is needed to read the part alone.

    `prefix_rows` and `pad_row` are base64 of row-major little-endian values of `dtype`.
    """

    schema_version: Literal[1] = 1
    layout: Layout
    dtype: DtypeName
    embed_dim: int
    max_length: int
    fingerprint: str
    layers: tuple[int, ...]
    prefix_rows: str = Field(description="[P, D]")
    pad_row: str = Field(description="[D]")

    @classmethod
    def build(  # noqa: D102 - arguments are the fields
        cls,
        *,
        layout: Layout,
        dtype: DtypeName,
        max_length: int,
        fingerprint: str,
        layers: tuple[int, ...],
        prefix_rows: Array,
        pad_row: Array,
    ) -> Self:
        prefix_rows, pad_row = _converted(prefix_rows, dtype), _converted(pad_row, dtype)
        if not (_all_finite(prefix_rows) and _all_finite(pad_row)):
            raise PartFormatError(f"the encoder's constant rows have values that {dtype} cannot hold")
        return cls(
            layout=layout,
            dtype=dtype,
            embed_dim=len(pad_row),
            max_length=max_length,
            fingerprint=fingerprint,
            layers=layers,
            prefix_rows=_to_base64(prefix_rows),
            pad_row=_to_base64(pad_row),
        )

    def constant_rows(self) -> tuple[Array, Array]:
        """Return `prefix_rows [P, D]` and `pad_row [D]`."""
        prefix = np.frombuffer(base64.b64decode(self.prefix_rows), DTYPES[self.dtype]).reshape(-1, self.embed_dim)
        return prefix, np.frombuffer(base64.b64decode(self.pad_row), DTYPES[self.dtype])


@dataclass(frozen=True, eq=False)
class EncodedRow:
    """A row of a part: own rows `[n, D]` in any float dtype, or the reason why there are none."""

    index: int
    id: str
    prompt: str
    own_rows: Array | None = None
    num_tokens: int | None = None
    truncated: bool | None = None
    error: str | None = None


@dataclass
class RowCounts:
    """What is in the rows of a part; `errors` are the first of the rows that failed."""

    rows: int = 0
    failed: int = 0
    truncated: int = 0
    tokens: int = 0
    errors: list[RowError] = field(default_factory=list)

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row, given by its columns."""
        self.rows += 1
        self.tokens += row.get("num_tokens") or 0
        self.truncated += bool(row.get("truncated"))
        if (error := row.get("error")) is not None:
            self.failed += 1
            if len(self.errors) < MAX_LISTED_ERRORS:
                self.errors.append(RowError(index=row["index"], id=row["id"], error=error))

    def report(self, index: int, size: int, sha256: str) -> PartReport:
        """Return the report of part `index`, whose file has `size` bytes."""
        part = PartSummary(
            index=index,
            rows=self.rows,
            bytes=size,
            sha256=sha256,
            succeeded=self.rows - self.failed,
            failed=self.failed,
            truncated=self.truncated,
            tokens=self.tokens,
        )
        return PartReport(part=part, errors=self.errors)


class PartWriter:
    """Writes the rows of one part, in order, with memory for one row group.

    Attributes:
        counts: of the rows so far.
    """

    def __init__(self, sink: IO[bytes] | io.RawIOBase, header: PartHeader, compression: Compression) -> None:
        self._header = header
        self._prefix_rows, self._pad_row = header.constant_rows()
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0
        self.counts = RowCounts()
        self._writer = open_writer(sink, compression)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        if kind is not None:
            self._pending.clear()  # nobody will read this file
        self.close()

    def write(self, row: EncodedRow) -> None:
        """Add a row. One that `dtype` cannot hold becomes a row with an error."""
        columns = self._columns(row)
        self.counts.add(columns)
        self._pending.append(columns)
        self._pending_bytes += 0 if columns["prompt_embeds"] is None else columns["prompt_embeds"].nbytes
        if self._pending_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the footer."""
        self._flush()
        close_writer(self._writer, self._header)

    def _columns(self, row: EncodedRow) -> dict[str, Any]:
        columns: dict[str, Any] = {"index": row.index, "id": row.id, "prompt": row.prompt}
        error = row.error
        if row.own_rows is not None:
            rows = _converted(row.own_rows, self._header.dtype)  # (n, D)
            if _all_finite(rows):
                return columns | self._embedding(rows) | {"num_tokens": row.num_tokens, "truncated": row.truncated}
            error = f"the embedding has values that {self._header.dtype} cannot hold"
        return columns | {"prompt_embeds": None, "error": error}

    def _embedding(self, own_rows: Array) -> dict[str, Any]:
        limit = self._header.max_length
        if self._header.layout == "dense":
            rows = dense_rows(own_rows, prefix_rows=self._prefix_rows, pad_row=self._pad_row, max_length=limit)
        else:
            rows = own_rows
        return {"prompt_embeds": rows, "text_ids": text_ids(limit - len(rows), limit)}

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(_part_table(self._pending), row_group_size=len(self._pending))
        self._pending, self._pending_bytes = [], 0


def open_writer(sink: IO[bytes] | io.RawIOBase, compression: Compression) -> pq.ParquetWriter:
    """Begin a file with the columns of a part."""
    return pq.ParquetWriter(
        sink,
        PART_SCHEMA,
        compression=compression,
        # Neither helps for bytes that never repeat, and both cost a pass over them.
        use_dictionary=False,
        write_statistics=["index", "id", "num_tokens", "truncated"],
    )


def close_writer(writer: pq.ParquetWriter, header: PartHeader) -> None:
    """Write the footer, with the header in it."""
    # As metadata of the schema it would be stored twice, once more inside pyarrow's own copy of the schema.
    writer.add_key_value_metadata({HEADER_KEY.decode(): header.model_dump_json()})
    writer.close()


def read_header(file: pq.ParquetFile, name: str) -> PartHeader:
    """Return the header of an open part.

    Raises:
        PartFormatError: the file, called `name` in the message, is not a part.
    """
    metadata = file.metadata.metadata or {}
    if HEADER_KEY not in metadata:
        raise PartFormatError(f"{name} is Parquet, but no part of layerstack: it has no metadata 'layerstack'")
    try:
        return PartHeader.model_validate_json(metadata[HEADER_KEY])
    except ValidationError as exc:
        raise PartFormatError(f"{name} is of a version that this layerstack cannot read: {exc}") from exc


def open_part(path: Path) -> pq.ParquetFile:
    """Open a part without reading its rows, memory-mapped.

    Raises:
        PartFormatError: the file is damaged or no Parquet.
        OSError: it cannot be opened.
    """
    path.open("rb").close()  # pyarrow's errors do not tell a file that cannot be opened from a damaged one
    return parse_part(path, str(path))


def parse_part(source: Path | IO[bytes], name: str) -> pq.ParquetFile:
    """Read the footer of a part, called `name` in errors.

    Raises:
        PartFormatError: the file is damaged or no Parquet.
        OSError: it cannot be read.
    """
    with damage_told(name):
        return pq.ParquetFile(source, memory_map=isinstance(source, Path))


@contextmanager
def damage_told(name: str) -> Iterator[None]:
    """Turn what arrow finds wrong with the file `name` into a `PartFormatError`.

    A file that cannot be read now, and a lack of memory, are no damage: they pass as they are.
    """
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:  # a column's name may be no UTF-8 any more
        # What arrow finds has no number; the operating system's errors have one.
        if isinstance(exc, MemoryError) or (isinstance(exc, OSError) and exc.errno is not None):
            raise
        raise PartFormatError(f"{name} is damaged or no Parquet: {exc}") from exc


def write_prompts(sink: IO[bytes], start: int, prompts: Sequence[Prompt]) -> None:
    """Write a chunk's prompts, the first of which stands at `start` in the job."""
    columns = [
        pa.array(range(start, start + len(prompts)), pa.int64()),
        pa.array([prompt.id for prompt in prompts]),
        pa.array([prompt.prompt for prompt in prompts]),
    ]
    pq.write_table(pa.table(columns, schema=PROMPT_SCHEMA), sink, compression="zstd", use_dictionary=False)


def read_prompts(source: IO[bytes], name: str) -> Iterator[tuple[int, Prompt]]:
    """Yield a chunk's prompts with their positions in the job.

    Raises:
        RecordFormatError: the file, called `name` in the message, is damaged.
    """
    try:
        with damage_told(name), closing(pq.ParquetFile(source)) as file:
            for batch in file.iter_batches(_PROMPTS_AT_ONCE):
                for row in batch.to_pylist():
                    yield row["index"], Prompt(id=row["id"], prompt=row["prompt"])
    except PartFormatError as exc:
        raise RecordFormatError(str(exc)) from exc
    except (KeyError, ValidationError) as exc:
        raise RecordFormatError(f"{name} is damaged: it has no prompts of a job in it") from exc


def _part_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    ids = [row.get("text_ids") for row in rows]
    offsets = np.cumsum([0, *(0 if each is None else len(each) for each in ids)])
    positions = np.concatenate([np.empty((0, 4), np.int64), *(each for each in ids if each is not None)])
    columns = {
        field.name: pa.array([row.get(field.name) for row in rows], field.type)
        for field in PART_SCHEMA
        if field.name not in {"prompt_embeds", "text_ids"}
    }
    columns["prompt_embeds"] = _binary_column([row.get("prompt_embeds") for row in rows])
    columns["text_ids"] = pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()),
        pa.FixedSizeListArray.from_arrays(pa.array(positions.reshape(-1)), 4),
        mask=pa.array([each is None for each in ids]),
    )
    return pa.table([columns[name] for name in PART_SCHEMA.names], schema=PART_SCHEMA)


def _converted(rows: Array, dtype: DtypeName) -> Array:
    """Return `rows` in `dtype`; what it cannot hold becomes infinite, which the caller has to look for."""
    with np.errstate(over="ignore"):
        return rows.astype(DTYPES[dtype], copy=False)


def _all_finite(rows: Array) -> bool:
    if rows.dtype == DTYPES["bfloat16"]:  # numpy asks ml_dtypes for each value; the exponent's bits tell the same
        return not (np.ascontiguousarray(rows).view(np.uint16) & 0x7F80 == 0x7F80).any()  # noqa: PLR2004
    return bool(np.isfinite(rows).all())


def _binary_column(arrays: Sequence[Array | None]) -> pa.Array:
    """Put the values of each array, row-major, into a column, with one copy."""
    present = [np.ascontiguousarray(each).view(np.uint8).reshape(-1) for each in arrays if each is not None]
    offsets = np.cumsum([0, *(0 if each is None else each.nbytes for each in arrays)], dtype=np.int64)
    values = np.concatenate([np.empty(0, np.uint8), *present])
    valid = pa.array([each is not None for each in arrays]).buffers()[1]
    buffers = [valid, pa.py_buffer(offsets), pa.py_buffer(values)]
    return pa.Array.from_buffers(pa.large_binary(), len(arrays), buffers)


def _to_base64(rows: Array) -> str:
    return base64.b64encode(np.ascontiguousarray(rows).tobytes()).decode("ascii")
