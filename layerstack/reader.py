"""Reads a job's Parquet as a map-style dataset of dense tensors."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import ml_dtypes
import numpy as np
import pyarrow.parquet as pq

from jobs.errors import PartFormatError
from jobs.layout import JobFolder, part_index
from jobs.parts import PartHeader, open_part, read_header
from jobs.records import JobRecord, Manifest
from jobs.tensors import DTYPES, Array, dense_rows, text_ids
from layerstack.errors import ReadError, RowFailedError

if TYPE_CHECKING:
    import torch

_COLUMNS = ["index", "id", "prompt", "prompt_embeds", "num_tokens", "truncated", "error"]


def read(path: str | Path) -> PromptEmbeddings:
    """Open one part, a folder of parts, or a job's folder, without reading any row yet.

    Raises:
        ReadError: nothing can be read there: the message says what is missing, damaged or mixed.
    """
    return PromptEmbeddings(_part_paths(Path(path).expanduser()))


class PromptEmbeddings:
    """The rows of one or more parts, in the order of the job's input. Works as a dataset for `torch.utils.data`.

    Attributes:
        header: layout, dtype and constants of all parts; `header.fingerprint` names their encoder.
    """

    def __init__(self, paths: list[Path]) -> None:
        parts = [_Part.open(path) for path in paths]
        self.header = parts[0].header
        for part in parts[1:]:
            if part.header != self.header:
                raise ReadError(
                    f"{part.path} and {parts[0].path} do not belong together: they were made by different encoders or "
                    f"options (fingerprints {part.header.fingerprint} and {self.header.fingerprint})"
                )
        self._parts = parts
        self._starts = list(accumulate((part.num_rows for part in parts), initial=0))
        self._prefix_rows, self._pad_row = self.header.constant_rows()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return row `position`, counted within what was opened; negative ones count from the end.

        Returns:
            `prompt_embeds [max_length, D]` in the stored dtype, `text_ids [max_length, 4]` int64, both torch tensors
            on the CPU; `index` in the job's input, `id`, `prompt`, `num_tokens`, `truncated`.

        Raises:
            IndexError: there is no such row.
            RowFailedError: the row was not encoded.
            ReadError: the part is damaged.
        """
        if not -len(self) <= position < len(self):
            raise IndexError(f"row {position} of {len(self)}")
        position %= len(self)
        which = bisect_right(self._starts, position) - 1
        row = self._parts[which].row(position - self._starts[which])
        if row["error"] is not None:
            raise RowFailedError(row["index"], row["error"])
        return {
            "prompt_embeds": _to_torch(self._dense(row["prompt_embeds"])),
            "text_ids": _to_torch(text_ids(0, self.header.max_length)),
            **{name: row[name] for name in ("index", "id", "prompt", "num_tokens", "truncated")},
        }

    def _dense(self, content: bytes) -> Array:
        rows = np.frombuffer(content, DTYPES[self.header.dtype]).reshape(-1, self.header.embed_dim)  # (n, D)
        if self.header.layout == "dense":
            return rows.copy()  # torch wants memory that it may write to
        return dense_rows(rows, prefix_rows=self._prefix_rows, pad_row=self._pad_row, max_length=self.header.max_length)


@dataclass(eq=False)
class _Part:
    """One file: what its footer says, and the row group that was read last."""

    path: Path
    header: PartHeader
    row_group_starts: list[int]
    _file: pq.ParquetFile | None = None
    _group: tuple[int, list[dict[str, Any]]] = field(default=(-1, []))

    @classmethod
    def open(cls, path: Path) -> Self:
        try:
            file = open_part(path)
            header = read_header(file, str(path))
        except PartFormatError as exc:
            raise ReadError(str(exc)) from exc
        sizes = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
        return cls(path, header, list(accumulate(sizes, initial=0)), file)

    @property
    def num_rows(self) -> int:
        return self.row_group_starts[-1]

    def row(self, position: int) -> dict[str, Any]:
        group = bisect_right(self.row_group_starts, position) - 1
        if self._group[0] != group:
            try:
                self._file = self._file or open_part(self.path)
                self._group = group, self._file.read_row_group(group, columns=_COLUMNS).to_pylist()
            except (OSError, PartFormatError) as exc:  # pyarrow's errors of damaged pages are OSErrors
                raise ReadError(f"{self.path}: row group {group} cannot be read: {exc}") from exc
        return self._group[1][position - self.row_group_starts[group]]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file behind: a DataLoader's worker opens its own."""
        return self.__dict__ | {"_file": None, "_group": (-1, [])}


def _part_paths(path: Path) -> list[Path]:
    """Find the parts that `path` means, in order."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ReadError(f"{path}: no such file or folder")
    job = JobFolder(path)
    if not (job.parts.is_dir() or job.record.is_file() or job.manifest.is_file()):
        return _listed(path)
    if job.manifest.is_file():
        num_parts = len(Manifest.model_validate_json(job.manifest.read_bytes()).parts)
    elif job.record.is_file():
        num_parts = JobRecord.model_validate_json(job.record.read_bytes()).num_chunks
    else:
        return _listed(job.parts)
    if missing := [n for n in range(num_parts) if not job.part(n).is_file()]:
        raise ReadError(
            f"{path}: {len(missing)} of {num_parts} parts are missing, the first is {job.part(missing[0]).name}; "
            f"to read what is there, open {job.parts}"
        )
    return [job.part(n) for n in range(num_parts)]


def _listed(folder: Path) -> list[Path]:
    numbered = sorted((n, path) for path in folder.iterdir() if (n := part_index(path)) is not None)
    if not numbered:
        raise ReadError(f"{folder}: no parts (00000.parquet, …) in this folder")
    return [path for _, path in numbered]


def _to_torch(array: Array) -> torch.Tensor:
    """Hand an array to torch without a copy; numpy's bfloat16 travels as 16-bit integers."""
    import torch  # noqa: PLC0415 - reading metadata must not need torch, which takes seconds to import

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
