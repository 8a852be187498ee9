"""Reads a job's Parquet as a map-style dataset of tensors."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, overload

import numpy as np
import numpy.typing as npt

from jobs.parts import PartHeader
from jobs.records import PartSummary
from layerstack.errors import OptionError, ReadError, RowFailedError, RowNotFoundError
from layerstack.openparts import OpenParts, StoredRow
from layerstack.rowtensors import Layout, RowTensors, Tensors
from layerstack.sources import open_source

_SHOWN_COLUMNS = ("index", "id", "prompt", "num_tokens", "truncated")
_SHOWN_DAMAGED = 5


def read(
    path_or_url: str | Path,
    *,
    layout: Layout = "dense",
    tensors: Tensors = "torch",
    skip_failed: bool = False,
    api_key: str | None = None,
) -> PromptEmbeddings:
    """Open a job's results as a dataset, without reading any row yet.

    Args:
        path_or_url: a job's folder, a folder of parts, or one part, as a path or at `file://`, `s3://` or `gs://`; or a
            job of a server, `http://HOST:PORT/jobs/ID`.
        layout: "dense" for all rows of a prompt, "own_rows" for its own; whichever of them is stored.
        tensors: "torch" for tensors on the CPU, "numpy" for arrays, whose bfloat16 is that of ml_dtypes.
        skip_failed: whether rows that were not encoded are left out; else reading such a row is an error.
        api_key: of the server; default the environment variable `LAYERSTACK_API_KEY`.

    Raises:
        ReadError: nothing can be read there: the message says what is missing, damaged or mixed.
        OptionError: an argument has a value that is not allowed.
        ServerError: the server says no, as it does while the job is not finished.
        ServerUnreachableError: nobody answers at the URL.
    """
    _check("layout", layout, get_args(Layout))
    _check("tensors", tensors, get_args(Tensors))
    _check("skip_failed", skip_failed, (True, False))
    parts = OpenParts(open_source(path_or_url, api_key))
    positions = _succeeded(parts) if skip_failed else range(parts.starts[-1])
    return PromptEmbeddings(parts, RowTensors(parts.header, layout, tensors), positions)


class PromptEmbeddings:
    """Rows of a job, in the order of its input. Works as a dataset for `torch.utils.data`.

    A slice or a list of positions makes another one, of some of the rows: nothing is read until a row is asked for.
    Several processes may read at once, forked or spawned; within one process, one thread at a time.
    """

    def __init__(self, parts: OpenParts, tensors: RowTensors, positions: Sequence[int] | npt.NDArray[np.int64]) -> None:
        self._parts, self._tensors, self._positions = parts, tensors, positions

    @property
    def header(self) -> PartHeader:
        """Layout, dtype, shapes and constants of the parts."""
        return self._parts.header

    @property
    def fingerprint(self) -> str:
        """The encoder that made the embeddings."""
        return self.header.fingerprint

    def __reduce__(self) -> tuple[type[PromptEmbeddings], tuple[Any, ...]]:
        return PromptEmbeddings, (self._parts, self._tensors, self._positions)

    def __repr__(self) -> str:
        return f"<{len(self)} rows of {self._parts.source.where}, fingerprint {self.fingerprint}>"

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, position: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, position: slice | Sequence[int] | npt.NDArray[Any]) -> PromptEmbeddings: ...
    def __getitem__(self, position: Any) -> dict[str, Any] | PromptEmbeddings:
        """Return the row at a position, counted within these rows; negative ones count from the end.

        Args:
            position: an integer; a slice, or a list or array of integers or of one bool a row, gives those rows
                unread, as another `PromptEmbeddings`.

        Returns:
            `prompt_embeds [max_length, D]` in the stored dtype and `text_ids [max_length, 4]` int64, which are the
            caller's to write to; `index` in the job's input, `id`, `prompt`, `num_tokens`, `truncated`. With own rows
            the tensors are `[n, D]` and `[n, 4]`.

        Raises:
            IndexError: there is no such row.
            RowFailedError: the row was not encoded.
            ReadError: the part is damaged.
        """
        if isinstance(position, slice):
            return self._some(self._positions[position])
        if hasattr(position, "__index__") and not getattr(position, "shape", ()):
            return self._row(self._positions[self._within(operator.index(position))])
        return self._some(self._chosen(np.asarray(position)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._row, self._positions)

    def by_index(self, index: int) -> dict[str, Any]:
        """Return the row that stands at `index` in the job's input, whichever parts and rows have been opened.

        Raises:
            RowNotFoundError: it is not among these rows.
            RowFailedError, ReadError: as for a position.
        """
        first = self._parts.first_indices
        number = max(bisect_right(first, index) - 1, 0)
        place = index - first[number]
        starts = self._parts.starts
        if 0 <= place < starts[number + 1] - starts[number] and starts[number] + place in self._members:
            return self._row(starts[number] + place)
        raise RowNotFoundError(f"no row with the index {index} among {self!r}")

    def by_id(self, wanted: str) -> dict[str, Any]:
        """Return the one row with an id; the first call reads the ids of all parts.

        Raises:
            RowNotFoundError: there is none among these rows, or several: `positions_of` finds them all.
            RowFailedError, ReadError: as for a position.
        """
        found = self.positions_of(wanted)
        if not found:
            raise RowNotFoundError(f"no row with the id {wanted!r} among {self!r}")
        if len(found) > 1:
            raise RowNotFoundError(
                f"{len(found)} rows have the id {wanted!r}: .positions_of({wanted!r}) tells their positions"
            )
        return self[found[0]]

    def positions_of(self, wanted: str) -> list[int]:
        """Return the positions of all rows with an id, in order; the first call reads the ids of all parts.

        Raises:
            ReadError: a part is damaged.
        """
        found = self._parts.ids.positions(wanted)
        if isinstance(self._positions, range):
            return [self._positions.index(position) for position in found if position in self._positions]
        return [int(each) for each in np.flatnonzero(np.isin(self._positions, found))]

    def stack(self, out: Any = None) -> dict[str, Any]:  # noqa: ANN401 - a tensor or an array
        """Read all these rows into one batch, each prompt straight to its place: `rows[8:16].stack()`.

        Args:
            out: a contiguous tensor on the CPU, or an array, `[B, max_length, D]` in the stored dtype, to be filled.

        Returns:
            `prompt_embeds [B, max_length, D]`, `text_ids [B, max_length, 4]`; `index`, `num_tokens` and `truncated`
            `[B]`; lists `id` and `prompt`.

        Raises:
            OptionError: own rows were asked for, which differ in number; or `out` is of another shape or dtype.
            RowFailedError, ReadError: as for a position.
        """
        embeds, targets, ids = self._tensors.batch(len(self), out)
        rows = []
        for position, target in zip(self._positions, targets, strict=True):
            row = self._read(position)
            self._tensors.fill(target, row.embeds)
            rows.append(row.columns)
        columns = {name: [row[name] for row in rows] for name in _SHOWN_COLUMNS}
        numbers = {"index": np.int64, "num_tokens": np.int64, "truncated": np.bool_}
        arrays = {name: self._tensors.given(np.array(columns[name], dtype)) for name, dtype in numbers.items()}
        return {"prompt_embeds": embeds, "text_ids": ids} | columns | arrays

    def verify(self, on_part: Callable[[PartSummary], None] = lambda _: None) -> None:
        """Read every part whole and compare its SHA-256 with the manifest's.

        Args:
            on_part: told of each part that has been read.

        Raises:
            ReadError: parts are damaged, which the message names; or there is no manifest to compare them with.
        """
        damaged = []
        for part in self._parts.source.parts:
            if part.summary is None:
                raise ReadError(f"{self._parts.source.where} has no manifest to compare with: open the job's folder")
            if self._parts.sha256(part) != part.summary.sha256:
                damaged.append(part.name)
            on_part(part.summary)
        if damaged:
            more = f" and {len(damaged) - _SHOWN_DAMAGED} more" if len(damaged) > _SHOWN_DAMAGED else ""
            raise ReadError(
                f"{', '.join(damaged[:_SHOWN_DAMAGED])}{more}: damaged, the SHA-256 is not the manifest's; fetch again"
            )

    def _row(self, position: int) -> dict[str, Any]:
        row = self._read(position)
        shown = {name: row.columns[name] for name in _SHOWN_COLUMNS}
        return self._tensors.of_row(row.embeds, row.columns["num_tokens"]) | shown

    def _read(self, position: int) -> StoredRow:
        row = self._parts.row(int(position))
        if row.columns["error"] is not None:
            raise RowFailedError(row.columns["index"], row.columns["error"])
        size, most = len(row.embeds or b""), self.header.max_length * self._tensors.row_bytes
        if size % self._tensors.row_bytes or size > most:
            raise ReadError(f"{row.part} is damaged: row {row.columns['index']} has {size} bytes of embeddings")
        return row

    def _some(self, positions: Sequence[int] | npt.NDArray[np.int64]) -> PromptEmbeddings:
        return PromptEmbeddings(self._parts, self._tensors, positions)

    def _within(self, position: int) -> int:
        if not -len(self) <= position < len(self):
            raise IndexError(f"row {position} of {len(self)}")
        return position % len(self)

    def _chosen(self, wanted: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        if wanted.ndim != 1 or (wanted.dtype.kind not in "iub" and wanted.size):
            raise TypeError(f"rows are chosen by integers, not by {wanted.dtype} of shape {wanted.shape}")
        if wanted.dtype == np.bool_:
            if len(wanted) != len(self):
                raise IndexError(f"{len(wanted)} bools for {len(self)} rows")
            wanted = np.flatnonzero(wanted)
        checked = [self._within(int(position)) for position in wanted]
        return np.array([self._positions[position] for position in checked], np.int64)

    @cached_property
    def _members(self) -> range | set[int]:
        """The rows that these are, to look one up."""
        return self._positions if isinstance(self._positions, range) else {int(each) for each in self._positions}


def _succeeded(parts: OpenParts) -> range | npt.NDArray[np.int64]:
    """Return the positions of the rows that have an embedding; reads the errors of parts that may have some."""
    failed = []
    for number, part in enumerate(parts.source.parts):
        if part.summary is None or part.summary.failed:
            errors = parts.column(number, "error")
            failed.append(parts.starts[number] + np.flatnonzero(errors.is_valid().to_numpy()))
    everything = range(parts.starts[-1])
    if not any(len(each) for each in failed):
        return everything
    positions: npt.NDArray[np.int64] = np.delete(np.arange(len(everything)), np.concatenate(failed))
    return positions


def _check(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise OptionError(f"{name}={value!r}: it has to be {' or '.join(map(repr, allowed))}")
