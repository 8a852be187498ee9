"""Prompt files in Parquet: the column `prompt`, and perhaps `id`; no other column is read.

Rows are read in batches, never a row group at once. A row may be a few bits that mean a long value of a dictionary, or
of the row before; but no value is larger than its page, decompressed, so the largest page says how many rows a batch
may have. A page itself is held whole, and the values of a dictionary twice.

Not covered: a page with an encoding of differences (`DELTA_LENGTH_BYTE_ARRAY`, `DELTA_BYTE_ARRAY`) says inside how many
lengths it has. Arrow believes that, and makes 4 bytes of each, up to 8 GiB.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import repeat
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from api.parquetpages import largest_page
from api.problems import Problem, invalid

_MAGIC = b"PAR1"
_TAIL_BYTES = 8  # the length of the footer, and the magic
_MAX_FOOTER_BYTES = 2**22
MAX_PAGE_BYTES = 2**27  # DuckDB writes pages of up to 100 MB
_BUFFER_BYTES = 2**16
_BATCH_BYTES = 2**26
_COLUMNS = ["prompt", "id"]
_MAX_REASON_CHARS = 200
_SHOWN_COLUMNS = 20


def read_parquet(file: IO[bytes], *, value_max_bytes: int, max_chars: int) -> Iterator[tuple[int, str | None, str]]:
    """Yield the number of each row, counted from 0, its id if it has one, and its prompt.

    Raises:
        Problem: the file is no Parquet or damaged, a column is missing or of a wrong type, a prompt is null, or a value
            is longer than `value_max_bytes`.
    """
    number = 0
    for batch in _batches(file, value_max_bytes):
        _check_lengths(batch, number, value_max_bytes, max_chars)
        prompts = _values(batch, "prompt", number)
        ids = _values(batch, "id", number) if "id" in batch.schema.names else repeat(None)
        for id_, prompt in zip(ids, prompts, strict=False):
            if prompt is None:
                raise invalid(f"row {number}", None, "a prompt is text, perhaps empty")
            yield number, None if id_ is None else str(id_), prompt
            number += 1


def _batches(file: IO[bytes], value_max_bytes: int) -> Iterator[Any]:
    """Yield record batches, of as many rows as fit into memory; arrow's errors are translated here."""
    try:
        metadata = _metadata(file)
        reader = pq.ParquetFile(
            file,
            metadata=metadata,
            buffer_size=_BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )
        _check_columns(reader.schema_arrow)
        for group in range(metadata.num_row_groups):
            value_bytes = max(value_max_bytes, _largest_page(file, metadata, group))
            num_rows = max(1, _BATCH_BYTES // value_bytes)
            yield from reader.iter_batches(num_rows, row_groups=[group], columns=_COLUMNS, use_threads=False)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as exc:  # a column's name may be no UTF-8
        if isinstance(exc, OSError) and exc.errno is not None:  # our disk failed; what arrow finds has no number
            raise
        raise _unreadable(str(exc)) from exc


def _largest_page(file: IO[bytes], metadata: Any, group: int) -> int:  # noqa: ANN401 - pyarrow has no annotations
    """Return the bytes of the largest page of our columns in a row group."""
    largest = 0
    for column in range(metadata.num_columns):
        if metadata.schema.column(column).path in _COLUMNS:
            start, length = _extent(metadata.row_group(group).column(column))
            try:
                largest = max(largest, largest_page(file, start, length))
            except ValueError as exc:
                raise _unreadable(str(exc)) from exc
    if largest > MAX_PAGE_BYTES:
        reason = f"a page has at most {MAX_PAGE_BYTES} bytes, decompressed"
        raise invalid("file", largest, reason, limit=MAX_PAGE_BYTES)
    return largest


def _extent(chunk: Any) -> tuple[int, int]:  # noqa: ANN401 - pyarrow has no annotations
    """Return where the pages of a column chunk begin, as arrow sees it, and how many bytes they have."""
    if chunk.num_values <= 0:  # arrow reads no page of it, and its offsets may be those of none
        return 0, 0
    start, dictionary = chunk.data_page_offset, chunk.dictionary_page_offset or 0
    return dictionary if 0 < dictionary < start else start, chunk.total_compressed_size


def _metadata(file: IO[bytes]) -> Any:  # noqa: ANN401 - pyarrow has no annotations
    """Return the footer without two things that a writer may have put there, and that arrow has no option for.

    One is the arrow schema. By it a column may come as a dictionary, which arrow builds anew for each batch: if all
    values differ, that is all of them, each time. Without the schema, text of any kind comes as plain strings. The
    other is the name of a writer of whose early versions arrow reads 100 bytes more than a column has, pages perhaps
    that we would not have looked at. Both get a name that arrow does not know, of the same length.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
    if not tail.endswith(_MAGIC):
        raise invalid("file", tail, f"not a Parquet file, which ends with {_MAGIC!r}")
    num_bytes = int.from_bytes(tail[:4], "little")
    if num_bytes > min(_MAX_FOOTER_BYTES, size - _TAIL_BYTES):
        reason = f"the footer has at most {_MAX_FOOTER_BYTES} bytes, and no more than the file"
        raise invalid("file", num_bytes, reason, limit=_MAX_FOOTER_BYTES)
    file.seek(size - _TAIL_BYTES - num_bytes)
    footer = file.read(num_bytes).replace(b"ARROW:schema", b"arrow:schema")
    footer = re.sub(rb"(?i)parquet-mr", b"parquet_mr", footer)
    return pq.read_metadata(pa.BufferReader(_MAGIC + footer + tail))


def _check_columns(schema: Any) -> None:  # noqa: ANN401 - pyarrow has no annotations
    names = schema.names
    if names.count("prompt") != 1 or names.count("id") > 1:
        raise invalid("file", names[:_SHOWN_COLUMNS], "needs one column 'prompt', and has at most one 'id'")
    types = {name: schema.field(name).type for name in ("prompt", "id") if name in names}
    if types["prompt"] != pa.string():
        raise invalid("prompt", str(types["prompt"]), "the column must be text")
    # A column of which nobody knew a value has the type null.
    if "id" in types and not (types["id"] in {pa.string(), pa.null()} or pa.types.is_integer(types["id"])):
        raise invalid("id", str(types["id"]), "the column must be text or whole numbers")


def _check_lengths(batch: Any, first: int, value_max_bytes: int, max_chars: int) -> None:  # noqa: ANN401 - as above
    """Refuse values that are too long before they are Python's, where a character may take 4 bytes."""
    if batch.nbytes <= value_max_bytes:  # as of most batches, and quickly told
        return
    for name in _COLUMNS:
        if name in batch.schema.names and batch.schema.field(name).type == pa.string():
            is_too_long = pc.greater(pc.binary_length(batch.column(name)), value_max_bytes)
            if (row := pc.index(is_too_long, value=True).as_py()) >= 0:
                field = f"row {first + row}"
                what = f"{name} has more than {value_max_bytes} bytes"
                detail = f"{field}: {what}; a prompt has at most {max_chars} characters"
                raise Problem("prompt-too-long", detail, field=field, limit=max_chars)


def _values(batch: Any, name: str, first: int) -> list[Any]:  # noqa: ANN401 - pyarrow has no annotations
    """Return a column as Python objects; `first` is the number of its first row."""
    column = batch.column(name)
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError as exc:
        if len(column) > 1:
            return [value for row in range(len(column)) for value in _values(batch.slice(row, 1), name, first + row)]
        raise invalid(
            f"row {first}", exc.object[:100], f"{name} must be UTF-8 ({exc.reason} at byte {exc.start})"
        ) from exc


def _unreadable(reason: str) -> Problem:
    shown = " ".join(reason.split())[:_MAX_REASON_CHARS]
    return Problem("invalid-request", f"file: not a Parquet file that can be read ({shown})", field="file")
