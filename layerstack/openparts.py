"""Rows as they are stored, out of parts that are opened when they are first needed."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.parts import PartHeader, read_header
from jobs.tensors import DTYPES, Array
from layerstack.errors import ReadError
from layerstack.partchecks import SMALL_COLUMNS, check_columns, check_together, read_errors
from layerstack.plainvalues import plain_value
from layerstack.rowids import RowIds
from layerstack.sources import PartFile, Source

_OPEN_FILES = 16
_PIECE_BYTES = 8 * 2**20
_COLUMNS = [*SMALL_COLUMNS, "prompt_embeds"]


@dataclass(frozen=True)
class StoredRow:
    """A row as it is stored.

    Attributes:
        columns: all but `prompt_embeds` and `text_ids`, by name.
        embeds: the bytes of `prompt_embeds`; None if the row failed.
        part: name of the file it is in.
    """

    columns: dict[str, Any]
    embeds: pa.Buffer | None
    part: str


class OpenParts:
    """The rows of a source's parts, one after the other.

    With a manifest, which tells how many rows each part has, a part is looked into when it is first needed; without
    one, all are at once. Whenever that is, its header has to be that of the first part. The files used last stay open,
    and the row group read last in memory. For one thread at a time; a forked or spawned process opens its own files.

    Attributes:
        source: where the parts are.
        header: of all parts: layout, dtype and constants.
        starts: position of the first row of each part, and the number of rows.
    """

    _pid: int
    _files: OrderedDict[int, _OpenFile]
    _group: tuple[int, int, pa.Table]
    """Number of a part, of a row group in it, and its rows."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._group_starts: dict[int, list[int]] = {}  # of the parts that have been looked into
        self._forget_files()
        self.header = self._look_into(0)
        summaries = [part.summary for part in source.parts]
        sizes = (self._num_rows(n) if each is None else each.rows for n, each in enumerate(summaries))
        self.starts: list[int] = list(accumulate(sizes, initial=0))

    def row(self, position: int) -> StoredRow:
        """Read one row.

        Raises:
            ReadError: its part is damaged, has gone, or belongs to something else.
        """
        number = bisect_right(self.starts, position) - 1
        position -= self.starts[number]
        starts = self._groups(number)
        group = bisect_right(starts, position) - 1
        if self._group[:2] != (number, group):
            with self._reading(number) as file:
                columns = _COLUMNS if file.mapped is None else SMALL_COLUMNS
                self._group = number, group, file.read_group(group, columns)
        rows, place = self._group[2], position - starts[group]
        row = {name: rows.column(name)[place].as_py() for name in SMALL_COLUMNS}
        embeds = self._embeds(place) if row["error"] is None else None
        return StoredRow(row, embeds, self.source.parts[number].name)

    def column(self, number: int, name: str) -> pa.ChunkedArray:
        """Read one column of a whole part.

        Raises:
            ReadError: as `row`.
        """
        self._groups(number)
        with self._reading(number) as file:
            return file.parquet.read([name], use_threads=False).column(name)

    @cached_property
    def ids(self) -> RowIds:
        """Finds rows by id, once the ids of all parts have been read."""
        columns = (self.column(number, "id") for number in range(len(self.source.parts)))
        return RowIds(each for column in columns for each in column.to_pylist())

    @cached_property
    def first_indices(self) -> list[int]:
        """Where the first row of each part stands in the job's input; the others of the part follow it."""
        if self.source.parts[0].summary is not None and self.source.parts[0].summary.index == 0:
            return self.starts[:-1]  # by a manifest, all parts are there
        return [self._first_index(number) for number in range(len(self.source.parts))]

    def _first_index(self, number: int) -> int:
        self._groups(number)
        with self._reading(number) as file:
            return int(file.read_group(0, ["index"]).column("index")[0].as_py())

    def sha256(self, part: PartFile) -> str:
        """Read a part whole -> its SHA-256 in hexadecimal.

        Raises:
            ReadError: it cannot be read.
        """
        digest = hashlib.sha256()
        with read_errors(part.name), _opened(self.source.open(part)) as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files and what was read behind."""
        return {name: getattr(self, name) for name in ("source", "header", "starts", "_group_starts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget_files()

    def _embeds(self, place: int) -> pa.Buffer:
        """Return the embeddings of a row of the row group read last: in place if they can be found there."""
        number, group, rows = self._group
        if "prompt_embeds" not in rows.column_names:
            with self._reading(number) as file:
                tokens, errors = (rows.column(name)[place:].to_pylist() for name in ("num_tokens", "error"))
                sizes = [self._sizes(n) for n, error in zip(tokens, errors, strict=True) if error is None]
                if (found := file.value(group, sizes)) is not None:
                    return found
                rows = rows.append_column("prompt_embeds", file.read_group(group, ["prompt_embeds"]).column(0))
                self._group = number, group, rows
        return rows.column("prompt_embeds")[place].as_buffer()

    def _sizes(self, num_tokens: int) -> set[int]:
        """Return the bytes that the embeddings of a prompt can have, with padding at the left or at the right."""
        length, itemsize = self.header.max_length, DTYPES[self.header.dtype].itemsize
        prefix_length = len(self._prefix_rows)
        counts = {length} if self.header.layout == "dense" else {num_tokens - prefix_length, length - prefix_length}
        return {count * self.header.embed_dim * itemsize for count in counts}

    @cached_property
    def _prefix_rows(self) -> Array:
        return self.header.constant_rows()[0]

    def _groups(self, number: int) -> list[int]:
        """Return where each row group of a part begins, and its number of rows."""
        if number not in self._group_starts:
            self._look_into(number)
        return self._group_starts[number]

    def _num_rows(self, number: int) -> int:
        return self._groups(number)[-1]

    def _look_into(self, number: int) -> PartHeader:
        """Read a part's footer, and check that it belongs to the others."""
        part, first = self.source.parts[number], self.source.parts[0]
        with self._reading(number) as file:
            header = read_header(file.parquet, part.name)
            if number:
                check_together(part.name, header, first.name, self.header)
            if self.source.fingerprint not in {None, header.fingerprint}:
                raise ReadError(
                    f"{part.name} was made by the encoder {header.fingerprint}, the manifest is of "
                    f"{self.source.fingerprint}: they do not belong together; fetch the job again"
                )
            check_columns(part.name, file.parquet.schema_arrow.names, _COLUMNS)
            metadata = file.parquet.metadata
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            if part.summary is not None and sum(sizes) != part.summary.rows:
                raise ReadError(f"{part.name} has {sum(sizes)} rows, and {part.summary.rows} by the manifest")
            self._group_starts[number] = list(accumulate(sizes, initial=0))
        return header

    @contextmanager
    def _reading(self, number: int) -> Iterator[_OpenFile]:
        part = self.source.parts[number]
        with read_errors(part.name):
            yield self._file(number, part)

    def _file(self, number: int, part: PartFile) -> _OpenFile:
        if self._pid != os.getpid():
            self._forget_files()
        if number not in self._files:
            self._files[number] = _OpenFile(self.source.open(part))
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(number)
        return self._files[number]

    def _forget_files(self) -> None:
        self._pid = os.getpid()
        self._files = OrderedDict()
        self._group = -1, -1, None


class _OpenFile:
    """A part that is open.

    Attributes:
        parquet: its reader.
        mapped: the file in memory, if it is on this machine.
    """

    def __init__(self, found: Path | IO[bytes]) -> None:
        self.mapped: pa.MemoryMappedFile | None = None
        if isinstance(found, Path):
            found.open("rb").close()  # pyarrow's errors do not tell a file that cannot be opened from a damaged one
            self.mapped = pa.memory_map(str(found))
        # A file elsewhere is read in as few requests as can be.
        self.parquet = pq.ParquetFile(self.mapped or found, pre_buffer=self.mapped is None)

    def read_group(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Read columns of a row group."""
        return self.parquet.read_row_group(group, columns=list(columns), use_threads=False)

    def value(self, group: int, sizes: Sequence[Iterable[int]]) -> pa.Buffer | None:
        """See `plain_value`."""
        return plain_value(self.mapped, self.parquet.metadata.row_group(group), sizes) if self.mapped else None


def _opened(found: Path | IO[bytes]) -> IO[bytes]:
    return found.open("rb") if isinstance(found, Path) else found
