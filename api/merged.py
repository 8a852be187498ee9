"""All parts of a job as one Parquet file, made while it is sent."""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import pyarrow.parquet as pq

from api.pieces import Pieces
from jobs.errors import PartFormatError, RecordFormatError
from jobs.layout import job_names
from jobs.parts import PartHeader, close_writer, damage_told, open_writer, parse_part, read_header
from jobs.records import JobRecord
from jobs.storage import Storage


def merged_parts(storage: Storage, record: JobRecord) -> Generator[memoryview]:
    """Yield a Parquet file with the rows of all parts of a job, in pieces of 1 MiB at most.

    The file is what a part is: same columns, header, compression and row groups. One row group is held at a time, and
    what the footer says of each.

    Raises:
        RecordFormatError: a part is missing or damaged, or its header is not that of the first.
    """
    sink, header = _Sink(), None
    writer = open_writer(sink, record.compression)
    try:
        for chunk in range(record.num_chunks):
            name = job_names(record.id).part(chunk)
            with storage.open(name) as file, closing(parse_part(file, name)) as part:
                header = _same(read_header(part, name), header, name)
                yield from _copied(part, name, writer, sink)
        if header is not None:
            close_writer(writer, header)
            yield from sink.taken()
    except FileNotFoundError as exc:
        raise RecordFormatError(f"a part is missing: {exc}") from exc
    except PartFormatError as exc:
        raise RecordFormatError(str(exc)) from exc
    finally:
        writer.close()


def _copied(part: pq.ParquetFile, name: str, writer: pq.ParquetWriter, sink: _Sink) -> Iterator[memoryview]:
    for group in range(part.num_row_groups):
        _copy(part, name, group, writer)
        yield from sink.taken()


def _copy(part: pq.ParquetFile, name: str, group: int, writer: pq.ParquetWriter) -> None:
    """Write a row group, of which only what was written is held while it is sent."""
    with damage_told(name):
        rows = part.read_row_group(group, use_threads=False)
    writer.write_table(rows, row_group_size=len(rows))


def _same(header: PartHeader, first: PartHeader | None, name: str) -> PartHeader:
    if first is not None and header != first:
        raise PartFormatError(f"{name} was made by another encoder than the parts before it, or with other options")
    return header


class _Sink(io.RawIOBase):
    """Keeps what is written until it is taken. Cannot seek."""

    def __init__(self) -> None:
        self._pieces = Pieces()

    def writable(self) -> bool:
        """Tell that it is for writing."""
        return True

    def write(self, content: Any) -> int:  # noqa: ANN401 - whatever has a buffer
        """Keep `content`; what is no bytes may be changed by its owner, and is copied."""
        return self._pieces.write(bytes(content))

    def taken(self) -> list[memoryview]:
        """Return what has been written since this was last called, and forget it."""
        written, self._pieces = self._pieces.finish(), Pieces()
        return written
