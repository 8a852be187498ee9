"""Those who store and read embeddings in `benchmarks.reader`: our parts, and dense tensors in three other ways."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

import layerstack
from jobs.parts import EncodedRow, PartHeader, PartWriter
from jobs.records import MAX_CHUNK_TOKENS
from jobs.tensors import DTYPES, Array, dense_rows

LENGTH, PREFIX_ROWS, EMBED_DIM = 512, 32, 15360
BITS = np.int16
_POOL_ROWS = 2048


class Rows:
    """Random rows of the real shape: a prompt's are some of a pool, so that none has to be made twice.

    Args:
        own_rows: of each prompt, how many.
    """

    def __init__(self, own_rows: Sequence[int]) -> None:
        self.own_rows = own_rows
        generator = np.random.default_rng(0)
        values = generator.standard_normal((_POOL_ROWS, EMBED_DIM), np.float32)
        self._pool = values.astype(DTYPES["bfloat16"])
        self._starts = generator.integers(0, _POOL_ROWS - LENGTH, len(own_rows))

    def __len__(self) -> int:
        return len(self.own_rows)

    def own(self, position: int) -> Array:
        """Return the own rows of a prompt, `[n, D]`."""
        start = self._starts[position]
        return self._pool[start : start + self.own_rows[position]]

    def dense(self, position: int) -> Array:
        """Return all rows of a prompt, `[512, D]`."""
        prefix, pad = self._pool[:PREFIX_ROWS], self._pool[-1]
        return dense_rows(self.own(position), prefix_rows=prefix, pad_row=pad, max_length=LENGTH)

    def header(self, layout: str) -> PartHeader:
        """Return the header of their parts."""
        fields = {"dtype": "bfloat16", "max_length": LENGTH, "fingerprint": "0" * 16, "layers": (10, 20, 30)}
        return PartHeader.build(layout=layout, prefix_rows=self._pool[:PREFIX_ROWS], pad_row=self._pool[-1], **fields)


class Contestant(ABC):
    """Stores prompts in files of its own, and reads dense tensors from them into a batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def write(self, rows: Rows, positions: Sequence[int]) -> None:
        """Store the prompts at `positions`."""

    @abstractmethod
    def read(self, positions: Sequence[int], batch: torch.Tensor) -> None:
        """Put prompts into `batch [B, 512, D]`."""

    def open(self) -> None:  # noqa: B027 - files of one prompt are opened when they are read
        """Open what stays open while prompts are read."""

    def close(self) -> None:  # noqa: B027 - likewise
        """Close it."""

    def size(self) -> int:
        """Return the bytes on disk."""
        return sum(path.stat().st_size for path in self._files())

    def forget(self) -> None:
        """Take its files, which must be closed, out of the page cache."""
        for path in self._files():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _files(self) -> Iterator[Path]:
        return (path for path in self.folder.iterdir() if path.is_file())


class Ours(Contestant):
    """Parts of layerstack; `stack` puts each prompt straight to its place in the batch."""

    def write(self, rows: Rows, positions: Sequence[int]) -> None:  # noqa: ARG002 - they are among all
        """Store all prompts, as a job does: the sample is read from among them."""
        for number, chunk in enumerate(_chunks(rows.own_rows)):
            write_part(self.folder / f"{number:05d}.parquet", rows, chunk, "own_rows")

    def open(self) -> None:
        """Open the folder."""
        self._rows = layerstack.read(self.folder)

    def close(self) -> None:
        """Close the parts."""
        del self._rows

    def read(self, positions: Sequence[int], batch: torch.Tensor) -> None:
        """Read them as one batch."""
        self._rows[positions].stack(out=batch)


class OursByRow(Ours):
    """The same parts, each prompt made into a tensor of its own first, and copied then."""

    def write(self, rows: Rows, positions: Sequence[int]) -> None:
        """Do nothing: the parts are there."""

    def read(self, positions: Sequence[int], batch: torch.Tensor) -> None:
        """Read them one by one."""
        for place, position in enumerate(positions):
            batch[place].copy_(self._rows[position]["prompt_embeds"])


class TorchFiles(Contestant):
    """One `.pt` a prompt, mapped when it is read: that is faster than reading it."""

    def write(self, rows: Rows, positions: Sequence[int]) -> None:
        """Save each."""
        for position in positions:
            torch.save(_tensor(rows.dense(position)), self.folder / f"{position:06d}.pt")

    def read(self, positions: Sequence[int], batch: torch.Tensor) -> None:
        """Load and copy each."""
        for place, position in enumerate(positions):
            batch[place].copy_(torch.load(self.folder / f"{position:06d}.pt", weights_only=True, mmap=True))


class SafetensorsFiles(Contestant):
    """One `.safetensors` a prompt."""

    def write(self, rows: Rows, positions: Sequence[int]) -> None:
        """Save each."""
        for position in positions:
            save_file({"prompt_embeds": _tensor(rows.dense(position))}, self.folder / f"{position:06d}.safetensors")

    def read(self, positions: Sequence[int], batch: torch.Tensor) -> None:
        """Load and copy each."""
        for place, position in enumerate(positions):
            batch[place].copy_(load_file(self.folder / f"{position:06d}.safetensors")["prompt_embeds"])


class DenseParquet(Contestant):
    """Parquet of dense tensors, a row group a prompt, read by pyarrow alone."""

    def write(self, rows: Rows, positions: Sequence[int]) -> None:
        """Store them in one file."""
        self._groups = {position: group for group, position in enumerate(positions)}
        write_part(self.folder / "dense.parquet", rows, positions, "dense")

    def open(self) -> None:
        """Open the file."""
        self._file = pq.ParquetFile(self.folder / "dense.parquet", memory_map=True)

    def close(self) -> None:
        """Close the file."""
        del self._file

    def read(self, positions: Sequence[int], batch: torch.Tensor) -> None:
        """Read the row group of each, and copy it."""
        bits = batch.view(torch.int16).numpy()
        for place, position in enumerate(positions):
            table = self._file.read_row_group(self._groups[position], columns=["prompt_embeds"], use_threads=False)
            bits[place] = np.frombuffer(table.column(0)[0].as_buffer(), BITS).reshape(LENGTH, EMBED_DIM)


CONTESTANTS: dict[str, type[Contestant]] = {
    "ours": Ours,
    "ours_by_row": OursByRow,
    "pt": TorchFiles,
    "safetensors": SafetensorsFiles,
    "dense_parquet": DenseParquet,
}


def write_part(path: Path, rows: Rows, positions: Sequence[int], layout: str) -> None:
    """Write a part with the prompts at `positions`."""
    with path.open("wb") as file, PartWriter(file, rows.header(layout), "none") as part:
        for position in positions:
            own = rows.own(position)
            part.write(EncodedRow(position, str(position), "a prompt", own, PREFIX_ROWS + len(own), truncated=False))


def _chunks(own_rows: Sequence[int]) -> Iterator[range]:
    """Cut prompts into chunks, as jobs do."""
    start = tokens = 0
    for position, count in enumerate(own_rows):
        if tokens and tokens + count > MAX_CHUNK_TOKENS:
            yield range(start, position)
            start, tokens = position, 0
        tokens += count
    yield range(start, len(own_rows))


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(array.view(BITS)).view(torch.bfloat16)
