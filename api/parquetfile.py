"""Prompt files in Parquet: the column `prompt`, and perhaps `id`; no other column is read.

Rows are read in batches, never a row group at once. Not covered: a page of these columns is held whole, and the values
of a dictionary twice; and values that are too long are in memory, a batch of them, when they are found to be so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import repeat
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from api.problems import Problem, invalid

_MAGIC = b"PAR1"
_TAIL_BYTES = 8  # the length of the footer, and the magic
_MAX_FOOTER_BYTES = 2**24
_BUFFER_BYTES = 2**16
_BATCH_BYTES = 2**26
_MAX_REASON_CHARS = 200
_SHOWN_COLUMNS = 20


def read_parquet(file: IO[bytes], *, max_chars: int) -> Iterator[tuple[int, str | None, str]]:
    """Yield the number of each row, counted from 0, its id if it has one, and its prompt.

    Raises:
        Problem: the file is no Parquet or damaged, a column is missing or of a wrong type, or a prompt is null.
    """
    number = 0
    for batch in _batches(file, max(1, _BATCH_BYTES // (4 * max_chars))):
        prompts = _values(batch, "prompt", number)
        ids = _values(batch, "id", number) if "id" in batch.schema.names else repeat(None)
        for id_, prompt in zip(ids, prompts, strict=False):
            if prompt is None:
                raise invalid(f"row {number}", None, "a prompt is text, perhaps empty")
            yield number, None if id_ is None else str(id_), prompt
            number += 1


def _batches(file: IO[bytes], num_rows: int) -> Iterator[Any]:
    """Yield record batches of at most `num_rows`; arrow's errors are translated here."""
    try:
        reader = pq.ParquetFile(
            file,
            metadata=_metadata(file),
            buffer_size=_BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )
        _check_columns(reader.schema_arrow)
        yield from reader.iter_batches(num_rows, columns=["prompt", "id"], use_threads=False)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as exc:  # a column's name may be no UTF-8
        if isinstance(exc, OSError) and exc.errno is not None:  # our disk failed; what arrow finds has no number
            raise
        raise _unreadable(str(exc)) from exc


def _metadata(file: IO[bytes]) -> Any:  # noqa: ANN401 - pyarrow has no annotations
    """Return the footer without the arrow schema that a writer may have put there.

    By that schema a column may come as a dictionary, which arrow builds anew for each batch: if all values differ, that
    is all of them, each time. Without the schema, text of any kind comes as plain strings. Arrow has no option for
    this, so the schema gets a name that arrow does not know, of the same length.
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
    return Problem(422, "invalid-request", f"file: not a Parquet file that can be read ({shown})", field="file")
