"""Reads a job's Parquet as a map-style dataset of dense tensors."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from jobs.errors import PartFormatError
from jobs.layout import JobNames, part_index
from jobs.parts import PartHeader, open_part, read_header
from jobs.records import JobRecord, Manifest
from jobs.tensors import DTYPES, Array, dense_rows, text_ids
from layerstack.errors import ReadError, RowFailedError

if TYPE_CHECKING:
    import torch

_R = TypeVar("_R", bound=BaseModel)
_OPEN_FILES = 8
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
        self._parts: list[_Part] = []
        for path in paths:
            part, header = _look_into(path)
            if not self._parts:
                self.header = header
            elif header != self.header:
                raise ReadError(
                    f"{path} and {paths[0]} do not belong together: they were made by different encoders or options "
                    f"(fingerprints {header.fingerprint} and {self.header.fingerprint})"
                )
            self._parts.append(part)
        self._starts = list(accumulate((part.num_rows for part in self._parts), initial=0))
        self._prefix_rows, self._pad_row = self.header.constant_rows()
        self._row_groups = _RowGroups()

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
        row = self._row_groups.row(self._parts[which], position - self._starts[which])
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


@dataclass(frozen=True)
class _Part:
    """What a part's footer says of its rows."""

    path: Path
    row_group_starts: list[int]

    @property
    def num_rows(self) -> int:
        return self.row_group_starts[-1]


def _look_into(path: Path) -> tuple[_Part, PartHeader]:
    """Read a part's footer, and close the file again: a job may have more parts than a process may have files."""
    with _opened(path) as file:
        try:
            header = read_header(file, str(path))
        except PartFormatError as exc:
            raise ReadError(str(exc)) from exc
        sizes = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
        return _Part(path, list(accumulate(sizes, initial=0))), header


class _RowGroups:
    """Reads single rows, keeping the files used last open and the row group read last in memory."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, pq.ParquetFile] = OrderedDict()
        self._last: tuple[Path | None, int] = None, -1
        self._rows: list[dict[str, Any]] = []

    def row(self, part: _Part, position: int) -> dict[str, Any]:
        group = bisect_right(part.row_group_starts, position) - 1
        if self._last != (part.path, group):
            try:
                self._rows = self._file(part.path).read_row_group(group, columns=_COLUMNS).to_pylist()
            except (pa.ArrowException, OSError) as exc:
                raise ReadError(f"{part.path}: row group {group} cannot be read: {exc}") from exc
            self._last = part.path, group
        return self._rows[position - part.row_group_starts[group]]

    def _file(self, path: Path) -> pq.ParquetFile:
        if path not in self._files:
            self._files[path] = _opened(path)
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(path)
        return self._files[path]

    def __reduce__(self) -> tuple[type[_RowGroups], tuple[()]]:
        """Leave open files behind: a DataLoader's worker opens its own."""
        return _RowGroups, ()


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return open_part(path)
    except PartFormatError as exc:
        raise ReadError(str(exc)) from exc
    except OSError as exc:
        raise ReadError(f"{path} cannot be opened: {exc.strerror}") from exc


def _part_paths(path: Path) -> list[Path]:
    """Find the parts that `path` means, in order."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ReadError(f"{path}: no such file or folder")
    job = JobNames(str(path))
    sizes = _expected_sizes(job)
    if sizes is None:
        return _listed(path)
    paths = [Path(job.part(n)) for n in range(len(sizes))]
    if missing := [part for part in paths if not part.is_file()]:
        raise ReadError(
            f"{path}: {len(missing)} of {len(paths)} parts are missing, the first is {missing[0].name}; "
            f"to read what is there, open {job.parts_folder}"
        )
    for part, size in zip(paths, sizes, strict=True):
        found = part.stat().st_size
        if size not in {None, found}:
            what = f"{part} has {found} bytes, and {size} by the manifest"
            raise ReadError(f"{what}: it is damaged, or of another job; fetch it again")
    return paths


def _expected_sizes(job: JobNames) -> list[int | None] | None:
    """Return the size of each part of a job's folder, None for one that is not known; None if it is another folder."""
    manifest, record, parts = Path(job.manifest), Path(job.record), Path(job.parts_folder)
    if manifest.is_file():
        return [part.bytes for part in _parsed(manifest, Manifest).parts]
    if record.is_file():
        return [None] * _parsed(record, JobRecord).num_chunks
    if parts.is_dir():
        raise ReadError(
            f"{job.folder}: its download is not complete, there is no manifest.json; "
            f"run `layerstack jobs fetch` again, or to read what is there, open {parts}"
        )
    return None


def _parsed(path: Path, kind: type[_R]) -> _R:
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as exc:
        raise ReadError(f"{path} is damaged, or of another version of layerstack: {exc}") from exc
    except OSError as exc:
        raise ReadError(f"{path} cannot be read: {exc.strerror}") from exc


def _listed(folder: Path) -> list[Path]:
    numbered = sorted((n, path) for path in folder.iterdir() if (n := part_index(path.name)) is not None)
    if not numbered:
        raise ReadError(f"{folder}: no parts (00000.parquet, …) in this folder")
    return [path for _, path in numbered]


def _to_torch(array: Array) -> torch.Tensor:
    """Hand an array to torch without a copy; numpy's bfloat16 travels as 16-bit integers."""
    import torch  # noqa: PLC0415 - reading metadata must not need torch, which takes seconds to import

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
