"""How an export is written, and what it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jobs.records import Compression
from jobs.tensors import DtypeName
from layerstack.rowtensors import Layout

Target = Literal["dense-parquet", "safetensors"]
Naming = Literal["index", "id"]


@dataclass(frozen=True)
class ExportOptions:
    """How rows are written.

    Attributes:
        to: which files.
        layout: of the tensors in safetensors files; Parquet is dense.
        dtype: None for that of the source.
        name: what a safetensors file is called after.
        compression: of Parquet.
    """

    to: Target
    layout: Layout = "dense"
    dtype: DtypeName | None = None
    name: Naming = "index"
    compression: Compression = "none"


@dataclass
class Exported:
    """What an export did. `overflowed` are those of `failed` whose values the dtype cannot hold."""

    written: int = 0
    kept: int = 0
    failed: int = 0
    overflowed: int = 0
