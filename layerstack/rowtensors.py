"""What is stored of a row, made into the tensors that a caller asked for."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from jobs.parts import PartHeader
from jobs.tensors import DTYPES, Array, text_ids
from layerstack.embeddings import to_torch
from layerstack.errors import OptionError

Layout = Literal["dense", "own_rows"]
Tensors = Literal["torch", "numpy"]
_BLOCK_BYTES = 2**20


class RowTensors:
    """Makes `prompt_embeds` and `text_ids` of rows that are stored as a header says.

    Values are moved about as integers of their size: numpy is slow with bfloat16, and torch has no other name for it.

    Args:
        header: of the parts.
        layout: "dense" for all rows of a prompt, "own_rows" for its own.
        tensors: "torch" for tensors on the CPU, "numpy" for arrays.
    """

    def __init__(self, header: PartHeader, layout: Layout, tensors: Tensors) -> None:
        self._header, self._layout, self._tensors = header, layout, tensors
        self._dtype = DTYPES[header.dtype]
        self._bits = np.dtype(f"i{self._dtype.itemsize}")
        prefix_rows, pad_row = header.constant_rows()
        self._prefix_rows, self._pad_row = prefix_rows.view(self._bits), pad_row.view(self._bits)  # (P, D), (D)
        # Copied from some at a time that fit into a core's cache: half the time of one by one, or of all at once.
        self._pad_rows = np.tile(self._pad_row, (max(1, _BLOCK_BYTES // self.row_bytes), 1))
        self._dense_ids = text_ids(0, header.max_length)

    def __reduce__(self) -> tuple[type[RowTensors], tuple[PartHeader, Layout, Tensors]]:
        return RowTensors, (self._header, self._layout, self._tensors)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a prompt."""
        return self._header.embed_dim * self._dtype.itemsize

    def of_row(self, stored: Any, num_tokens: int) -> dict[str, Any]:  # noqa: ANN401 - whatever has a buffer
        """Make the tensors of one row: `[max_length, D]` and `[max_length, 4]`, or `[n, D]` and `[n, 4]`.

        Args:
            stored: bytes of the stored rows.
            num_tokens: of the prompt, prefix included.
        """
        length, rows = self._header.max_length, self._stored(stored)
        if self._layout == "own_rows":
            own = self._own(rows, num_tokens)
            return {
                "prompt_embeds": self._made(own.copy()),
                "text_ids": self.given(text_ids(length - len(own), length)),
            }
        made = np.empty((length, self._header.embed_dim), self._bits)
        self._fill(made, rows)
        return {"prompt_embeds": self._made(made), "text_ids": self.given(self._dense_ids.copy())}

    def batch(self, count: int, out: Any = None) -> tuple[Any, Array, Any]:  # noqa: ANN401 - a tensor or an array
        """Return `prompt_embeds [count, max_length, D]`, the same to be filled, and `text_ids [count, max_length, 4]`.

        Args:
            count: rows.
            out: memory to use, as a tensor on the CPU or an array.

        Raises:
            OptionError: `out` has another shape or dtype, or own rows were asked for.
        """
        if self._layout == "own_rows":
            raise OptionError("own rows differ in number and make no batch: read with layout='dense'")
        shape = (count, self._header.max_length, self._header.embed_dim)
        ids = np.broadcast_to(self._dense_ids, (count, *self._dense_ids.shape)).copy()
        if out is None and self._tensors == "torch" and _torch().utils.data.get_worker_info() is not None:
            # Where a worker of a DataLoader sends its tensors from; otherwise it would copy them there.
            out = _torch().empty(shape, dtype=getattr(_torch(), self._header.dtype)).share_memory_()
        if out is None:
            bits = np.empty(shape, self._bits)
            return self._made(bits), bits, self.given(ids)
        return out, self._bits_of(out, shape), self.given(ids)

    def fill(self, target: Array, stored: Any) -> None:  # noqa: ANN401 - whatever has a buffer
        """Put a dense prompt into `target [max_length, D]`, which `batch` has returned."""
        self._fill(target, self._stored(stored))

    def given(self, array: Array) -> Any:  # noqa: ANN401 - a tensor or an array
        """Return an array as what the caller asked for, without a copy."""
        return _to_torch(array) if self._tensors == "torch" else array

    def _stored(self, stored: Any) -> Array:  # noqa: ANN401 - whatever has a buffer
        return np.frombuffer(stored, self._bits).reshape(-1, self._header.embed_dim)

    def _fill(self, target: Array, rows: Array) -> None:
        if self._header.layout == "dense":
            target[:] = rows
            return
        start = self._header.max_length - len(rows)
        pads = start - len(self._prefix_rows)
        step = len(self._pad_rows)
        for first in range(0, pads, step):
            target[first : min(first + step, pads)] = self._pad_rows[: pads - first]
        target[pads:start] = self._prefix_rows
        target[start:] = rows

    def _own(self, rows: Array, num_tokens: int) -> Array:
        """Return the own rows among the stored ones."""
        if self._header.layout == "own_rows":
            return rows
        return own_of_dense(rows, num_tokens, self._prefix_rows)

    def _made(self, bits: Array) -> Any:  # noqa: ANN401 - a tensor or an array
        return self.given(bits.view(self._dtype))

    def _bits_of(self, out: Any, shape: tuple[int, ...]) -> Array:  # noqa: ANN401 - a tensor or an array
        dtype = str(getattr(out, "dtype", None)).removeprefix("torch.")
        found = (*getattr(out, "shape", ()),)
        if (found, dtype) != (shape, self._header.dtype):
            raise OptionError(f"out of shape {found} and {dtype}: it has to be {shape} and {self._header.dtype}")
        if not (out.flags.c_contiguous if isinstance(out, np.ndarray) else out.is_contiguous()):
            raise OptionError("out has gaps: it has to be contiguous")
        if isinstance(out, np.ndarray):
            return out.view(self._bits)
        if out.device.type != "cpu":
            raise OptionError(f"out is on {out.device}: it has to be on the CPU")
        bits: Array = out.detach().view(getattr(_torch(), f"int{8 * self._bits.itemsize}")).numpy()
        return bits


def _to_torch(array: Array) -> Any:  # noqa: ANN401 - a tensor
    _torch()  # tells if there is none
    return to_torch(array)


def own_of_dense(rows: Array, num_tokens: int, prefix_rows: Array) -> Array:
    """Return the own rows of a dense prompt: with padding at the right they end in pad rows, which vary.

    Args:
        rows: `[max_length, D]`.
        num_tokens: of the prompt, prefix included.
        prefix_rows: `[P, D]`, which stand behind the pad rows at the left if there are any.
    """
    left, prefix = len(rows) - num_tokens, len(prefix_rows)
    is_left = np.array_equal(rows[left : left + prefix], prefix_rows)
    return rows[(left if is_left else 0) + prefix :]


def _torch() -> Any:  # noqa: ANN401 - a module
    try:
        import torch  # noqa: PLC0415 - reading metadata must not need torch, which takes seconds to import
    except ImportError as exc:
        raise OptionError(
            "tensors='torch' needs the package torch: pip install torch, or read with tensors='numpy'"
        ) from exc
    return torch
