"""Tensors without torch: numpy arrays, with bfloat16 from ml_dtypes, to and from safetensors bytes; dense rows."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, TensorSpec, deserialize, serialize

from jobs.errors import TensorFormatError

Array = npt.NDArray[Any]
DtypeName = Literal["bfloat16", "float16", "float32"]

DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
_SAFETENSORS_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": DTYPES["bfloat16"],
    "F16": DTYPES["float16"],
    "F32": DTYPES["float32"],
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
}
_SAFETENSORS_CODES = {dtype.name: code for code, dtype in _SAFETENSORS_DTYPES.items()}

if sys.byteorder != "little":
    raise ImportError("layerstack stores little-endian values and runs on little-endian machines only")


def dtype_name(array: Array) -> DtypeName:
    """Return the name of the dtype of rows.

    Raises:
        TensorFormatError: it is none that rows have.
    """
    if array.dtype.name not in DTYPES:
        raise TensorFormatError(f"rows are {', '.join(DTYPES)}, not {array.dtype.name}")
    return cast("DtypeName", array.dtype.name)


def save_tensors(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return `tensors` as the bytes of a safetensors file."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    specs = {
        name: TensorSpec(dtype=t.dtype.name, shape=t.shape, data_ptr=t.ctypes.data, data_len=t.nbytes)
        for name, t in contiguous.items()
    }
    return bytes(serialize(specs, metadata=dict(metadata) if metadata else None))


def load_tensors(content: bytes) -> tuple[dict[str, Array], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file; the arrays are read-only.

    Raises:
        TensorFormatError: the bytes are damaged, or a tensor has a dtype that we never write.
    """
    try:
        tensors = {
            name: np.frombuffer(view["data"], dtype=_SAFETENSORS_DTYPES[view["dtype"]]).reshape(view["shape"])
            for name, view in deserialize(content)  # type: ignore[no-untyped-call] # a stub of the library is unfinished
        }
        # The library's reader of bytes leaves the metadata out; the header is JSON behind its own length.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return tensors, header.get("__metadata__", {})
    except (SafetensorError, KeyError, ValueError) as exc:
        raise TensorFormatError(f"not a safetensors file of ours: {exc}") from exc


def safetensors_header(
    tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the beginning of a safetensors file, for one that is too large to be made in memory.

    Args:
        tensors: name, name of the dtype and shape of each, in the order in which their bytes follow without gaps.
        metadata: strings by name.

    Raises:
        KeyError: a dtype that we never write.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    stop = 0
    for name, dtype, shape in tensors:
        code = _SAFETENSORS_CODES[dtype]
        start, stop = stop, stop + math.prod(shape) * _SAFETENSORS_DTYPES[code].itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor lies at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def dense_rows(
    own_rows: Array, *, prefix_rows: Array, pad_row: Array, max_length: int, out: Array | None = None
) -> Array:
    """Put pad, prefix and own rows of one prompt together.

    Args:
        own_rows: `[n, D]`.
        prefix_rows: `[P, D]`.
        pad_row: `[D]`.
        max_length: rows in the result.
        out: what to write to and return, if it is there already.

    Returns:
        `[max_length, D]` in the dtype of `own_rows`.
    """
    rows = np.empty((max_length, own_rows.shape[1]), dtype=own_rows.dtype) if out is None else out
    start = max_length - len(own_rows)
    rows[: start - len(prefix_rows)] = pad_row
    rows[start - len(prefix_rows) : start] = prefix_rows
    rows[start:] = own_rows
    return rows


def text_ids(start: int, stop: int) -> Array:
    """Return the positions of rows `start` to `stop` of a prompt, `[stop - start, 4]` int64: row l is (0, 0, 0, l)."""
    ids = np.zeros((stop - start, 4), dtype=np.int64)
    ids[:, 3] = np.arange(start, stop)
    return ids
