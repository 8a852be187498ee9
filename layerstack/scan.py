"""Goes through parts in order, a row group at a time: their footers, their small columns, or whole rows. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.parts import PartHeader, read_header
from jobs.tensors import DTYPES, Array
from layerstack.partchecks import SMALL_COLUMNS, check_columns, check_together, read_errors
from layerstack.rowtensors import own_of_dense
from layerstack.sources import PartFile, Source


@dataclass(frozen=True)
class ScannedPart:
    """What a part's footer says."""

    file: PartFile
    bytes: int
    num_rows: int


class Parts:
    """The parts of a source, in order; only their footers have been read. For one thread.

    Attributes:
        source: where they are.
        header: of all parts.
        schema: of the first part; all have the columns of a part.
        compression: of the first part.
        parts: what each footer says.
        prefix_rows: `[P, D]`, of the header.

    Raises:
        ReadError: a part is missing, damaged, or belongs to something else; the message names it.
    """

    def __init__(self, source: Source, on_part: Callable[[], None] = lambda: None) -> None:
        self.source = source
        self.parts: list[ScannedPart] = []
        for part in source.parts:
            with self._opened(part) as (file, size):
                header = read_header(file, part.name)
                if not self.parts:
                    self.header, self.schema, self.compression = header, file.schema_arrow, _compression(file)
                    self.prefix_rows: Array = header.constant_rows()[0]
                check_together(part.name, header, source.parts[0].name, self.header)
                check_columns(part.name, file.schema_arrow.names)
                self.parts.append(ScannedPart(part, size, file.metadata.num_rows))
            on_part()

    @property
    def num_rows(self) -> int:
        """Rows of all parts."""
        return sum(part.num_rows for part in self.parts)

    def groups(self, columns: Sequence[str] = SMALL_COLUMNS) -> Iterator[RowGroup]:
        """Yield every row group, with `columns` of its rows read.

        Raises:
            ReadError: a part is damaged; the message names it.
        """
        for number in range(len(self.parts)):
            yield from self.groups_of(number, columns)

    def groups_of(self, number: int, columns: Sequence[str] = SMALL_COLUMNS) -> Iterator[RowGroup]:
        """Yield the row groups of part `number`.

        Raises:
            ReadError: the part is damaged; the message names it.
        """
        part = self.parts[number].file
        with self._opened(part) as (file, _):
            for group in range(file.num_row_groups):
                yield RowGroup(file, part.name, group, self.header, self.prefix_rows, columns)

    def group_with(self, position: int) -> tuple[RowGroup, int]:
        """Return the row group of the row at `position`, read, and the row's place in it.

        Raises:
            IndexError: there is no such row.
            ReadError: the part is damaged.
        """
        for number, part in enumerate(self.parts):
            if position < part.num_rows:
                for group in self.groups_of(number):
                    if position < group.num_rows:
                        group.embeddings  # noqa: B018 - reads them, while the file is open
                        return group, position
                    position -= group.num_rows
            position -= part.num_rows
        raise IndexError(position)

    @property
    def length_columns(self) -> tuple[str, ...]:
        """The columns that `num_own_rows` needs of a row group."""
        return ("text_ids",) if self.header.layout == "own_rows" else ("num_tokens",)

    def num_own_rows(self, group: RowGroup) -> Array:
        """Return how many own rows each row of `group` that succeeded has, in order.

        Raises:
            ReadError: a part is damaged.
        """
        if self.header.layout == "own_rows":
            stored: Array = group.stored_lengths.drop_null().to_numpy()
            return stored
        tokens: Array = group.table.column("num_tokens").drop_null().to_numpy()
        num_prefix_rows = len(self.prefix_rows)
        if self._pads_at_right:
            return np.full_like(tokens, self.header.max_length - num_prefix_rows)
        return tokens - num_prefix_rows

    @cached_property
    def _pads_at_right(self) -> bool:
        """Whether pad rows of dense parts come last, and are own rows: the first prompt that has pad rows tells."""
        for group in self.groups(("num_tokens",)):
            for place, tokens in enumerate(group.table.column("num_tokens").to_pylist()):
                if tokens is not None and tokens < self.header.max_length:
                    return bool(len(group.own_rows(place)) != tokens - len(self.prefix_rows))
        return False

    @contextmanager
    def _opened(self, part: PartFile) -> Iterator[tuple[pq.ParquetFile, int]]:
        """Open a part -> its file and its size. Only one is open at a time: a job may have thousands."""
        with read_errors(part.name):
            found = self.source.open(part)
            with found.open("rb") if isinstance(found, Path) else found as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                # A file elsewhere is read in as few requests as can be.
                is_local = isinstance(found, Path)
                opened = pq.ParquetFile(found if is_local else file, memory_map=is_local, pre_buffer=not is_local)
                with closing(opened):
                    yield opened, size


class RowGroup:
    """Some rows that follow one another, in one part. What has not been read can be while its part is open.

    Attributes:
        table: the columns that have been read.
    """

    def __init__(
        self,
        file: pq.ParquetFile,
        name: str,
        group: int,
        header: PartHeader,
        prefix_rows: Array,
        columns: Sequence[str],
    ) -> None:
        self._file, self._name, self._group = file, name, group
        # In a header the constants are a megabyte of base64, too long to be decoded for each row.
        self._header, self._prefix_rows = header, prefix_rows  # (P, D)
        self.table = self._read(columns)

    @property
    def num_rows(self) -> int:
        """Rows in it."""
        return int(self.table.num_rows)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows, by column."""
        found: list[dict[str, Any]] = self.table.to_pylist()
        return found

    def column(self, name: str) -> pa.ChunkedArray:
        """Read one more column.

        Raises:
            ReadError: the part is damaged.
        """
        return self._read([name]).column(name)

    @cached_property
    def embeddings(self) -> pa.ChunkedArray:
        """The column `prompt_embeds`, which is nearly all of the file; read when it is first asked for."""
        return self.column("prompt_embeds")

    def stored_rows(self, place: int) -> Array:
        """Return what is stored of a row that succeeded, `[n, D]` or `[max_length, D]`, read-only."""
        header = self._header
        return np.frombuffer(self.embeddings[place].as_buffer(), DTYPES[header.dtype]).reshape(-1, header.embed_dim)

    def own_rows(self, place: int) -> Array:
        """Return the own rows of a row that succeeded, `[n, D]`, read-only."""
        stored = self.stored_rows(place)
        if self._header.layout == "own_rows":
            return stored
        return own_of_dense(stored, self.table.column("num_tokens")[place].as_py(), self._prefix_rows)

    def num_own_rows(self, place: int) -> int:
        """Return how many own rows a row that succeeded has; reads no embedding where own rows are stored.

        Text ids tell: with padding at the right, own rows are more than tokens.
        """
        if self._header.layout == "own_rows":
            return int(self.stored_lengths[place].as_py())
        return len(self.own_rows(place))

    @cached_property
    def stored_lengths(self) -> pa.ChunkedArray:
        """How many rows are stored of each row, null for those that failed."""
        is_there = "text_ids" in self.table.column_names
        return pc.list_value_length(self.table.column("text_ids") if is_there else self.column("text_ids"))

    def _read(self, columns: Sequence[str]) -> pa.Table:
        with read_errors(self._name):
            return self._file.read_row_group(self._group, columns=list(columns))


def _compression(file: pq.ParquetFile) -> str:
    if file.metadata.num_row_groups == 0:
        return "none"
    found = str(file.metadata.row_group(0).column(0).compression).lower()
    return "none" if found == "uncompressed" else found
