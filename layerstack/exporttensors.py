"""Exports rows as a safetensors file a prompt; `layerstack/export.py` shows the folder."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jobs.files import written_whole
from jobs.parts import PartHeader
from jobs.tensors import DTYPES, Array, DtypeName, dense_rows, safetensors_header, text_ids
from layerstack.exportoptions import Exported, ExportOptions
from layerstack.exportsurvey import ID_BYTES
from layerstack.partsums import check_sum
from layerstack.scan import Parts, RowGroup

_INDEX = "index.jsonl"
# Most of the time for a small file is that the disk says it has it, which it says of several at once.
_WRITERS = 8


class TensorFiles:
    """Writes a safetensors file a prompt."""

    def __init__(self, parts: Parts, folder: Path, header: PartHeader, options: ExportOptions) -> None:
        self._parts, self._folder, self._header, self._options = parts, folder, header, options
        self._prefix_rows, self._pad_row = header.constant_rows()  # (P, D), (D)
        self._done, self._pending = Exported(), deque[Future[None]]()
        self._is_checked = False  # whether the part that is being read is what the manifest says

    def write(self, on_rows: Callable[[int], None]) -> Exported:
        """Write the files, and the index once they are there; `export` says how.

        Raises:
            ReadError: a part is damaged; nothing of its rows has been written if the manifest tells so.
        """
        with written_whole(self._folder / _INDEX) as index, ThreadPoolExecutor(_WRITERS) as self._pool:
            for number in range(len(self._parts.parts)):
                self._is_checked = False
                for group in self._parts.groups_of(number):
                    for place in range(group.num_rows):
                        line = json.dumps(self._line(number, group, place), ensure_ascii=False)
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

    def _line(self, number: int, group: RowGroup, place: int) -> dict[str, Any]:
        """Write a row's file, if it has one and that is not there -> what the index says of the row."""
        row = group.rows[place]
        line = {name: row[name] for name in ("index", "id", "prompt")}
        error = row["error"]
        if error is None:
            name = f"{row['id'] if self._options.name == 'id' else format(row['index'], '08d')}.safetensors"
            error = self._write(number, group, place, self._folder / name)
        if error is None:
            return line | {"file": name, "num_tokens": row["num_tokens"], "truncated": row["truncated"]}
        self._done.failed += 1
        return line | {"error": error}

    def _write(self, number: int, group: RowGroup, place: int, path: Path) -> str | None:
        """Write a file, unless it is there -> why it cannot be, if so."""
        row = group.rows[place]
        length = self._header.max_length
        if self._options.layout == "own_rows":
            length = group.num_own_rows(place)
        head = self._head(row, length)
        size = len(head) + length * (ID_BYTES + self._header.embed_dim * DTYPES[self._header.dtype].itemsize)
        # A file of this name is whole, and of this export: its size is another only if somebody has touched it.
        if path.is_file() and path.stat().st_size == size:
            self._done.kept += 1
            return None
        if not self._is_checked:  # of a part whose files are all there, nothing is read any more
            check_sum(self._parts.source, self._parts.parts[number].file)
            self._is_checked = True
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
