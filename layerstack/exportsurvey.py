"""What the small columns of a source tell before anything of it is exported."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.parts import PartHeader
from jobs.tensors import DTYPES
from layerstack.errors import ExportError
from layerstack.exportoptions import ExportOptions
from layerstack.scan import Parts, RowGroup

NAME_RULE = (
    "1 to 128 of A-Z a-z 0-9 . _ -, not beginning with a dot, and no two the same, "
    "also where capital letters are not told from small ones"
)
ID_BYTES = 4 * np.dtype(np.int64).itemsize
"""Of the text ids of one row."""
_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")
# What makes rows the same rows, whatever version of pyarrow wrote them, and in whatever row groups.
_IDENTITY = ("index", "id", "prompt", "error")
# What the file system adds to a file, about: its last block, and its name.
_FILE_BYTES = 4096


@dataclass
class Survey:
    """Which source it is, and how much there is to write.

    Attributes:
        succeeded: rows with an embedding.
        own_rows: of all of them together; counted only if own rows are to be written.
    """

    succeeded: int = 0
    own_rows: int = 0
    _digest: Any = field(default_factory=hashlib.sha256)
    _last_index: int = -1
    _names: set[str] = field(default_factory=set)

    @property
    def source(self) -> str:
        """SHA-256 that tells these rows from others."""
        return str(self._digest.hexdigest())

    def begin(self, header: PartHeader) -> None:
        """Take in what all rows have in common."""
        self._digest.update(header.model_dump_json().encode())

    def add(self, group: RowGroup) -> None:
        """Take in some rows.

        Raises:
            ExportError: they are out of order.
        """
        columns = [group.table.column(name).to_pylist() for name in _IDENTITY]
        for row in zip(*columns, strict=True):
            if row[0] <= self._last_index:
                raise ExportError(f"row {row[0]} comes behind row {self._last_index}: these parts are no one job's")
            self._last_index = row[0]
            self._digest.update(json.dumps(row).encode() + b"\n")
        self.succeeded += group.table.column("error").null_count

    def check_names(self, ids: pa.ChunkedArray) -> None:
        """Find out whether ids can be names of files.

        Raises:
            ExportError: one cannot; the message names it, and the rule.
        """
        for id_ in ids.to_pylist():
            what = None if _NAME.fullmatch(id_) else "is no name for a file"
            if what is None and id_.lower() in self._names:
                what = "comes twice"
            if what is not None:
                raise ExportError(
                    f"the id {id_!r} {what}; names by id need ids of {NAME_RULE}: export without --name id"
                )
            self._names.add(id_.lower())


def survey(parts: Parts, options: ExportOptions) -> Survey:
    """Read the small columns of all rows.

    Raises:
        ExportError: an id is no name for a file, though files are to be called after ids; or rows are out of order.
        ReadError: a part is damaged.
    """
    found = Survey()
    found.begin(parts.header)
    counts_own_rows = options.to == "safetensors" and options.layout == "own_rows"
    for group in parts.groups([*_IDENTITY, *(parts.length_columns if counts_own_rows else ())]):
        found.add(group)
        if counts_own_rows:
            found.own_rows += int(parts.num_own_rows(group).sum())
        if options.to == "safetensors" and options.name == "id":
            found.check_names(group.table.column("id"))
    return found


def needed_bytes(parts: Parts, found: Survey, header: PartHeader, options: ExportOptions) -> int:
    """Return about how much is to be written. Compressed Parquet takes less."""
    row_bytes = header.embed_dim * DTYPES[header.dtype].itemsize + ID_BYTES
    if options.to == "safetensors" and options.layout == "own_rows":
        return found.own_rows * row_bytes + found.succeeded * _FILE_BYTES
    if options.to == "dense-parquet" and options.compression != "none":
        return sum(part.bytes for part in parts.parts)  # at the least: how well pad rows compress is not known
    return found.succeeded * (header.max_length * row_bytes + _FILE_BYTES)
