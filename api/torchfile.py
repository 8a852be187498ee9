"""Tensors as `torch.save` would write them, without torch.

The file is an uncompressed zip with a short pickle that names the storage of each tensor, and the storages' bytes. The
pickle is written opcode by opcode: the standard library's pickler would have to import the torch globals it names.
Format: torch/serialization.py, `_save` and `_legacy_load`'s successor `_load`, version 3.
"""

from __future__ import annotations

import math
import operator
import pickle
import struct
import zipfile
from collections.abc import Sequence
from itertools import accumulate

from api.pieces import Pieces
from api.rows import RowTensor

_STORAGES = {"bfloat16": b"BFloat16Storage", "float16": b"HalfStorage", "float32": b"FloatStorage"}


def write_tensors(tensors: Sequence[RowTensor], pieces: Pieces) -> None:
    """Write a file that `torch.load(..., weights_only=True)` reads: as one tensor if it is stacked, else as a list."""
    values = [_tensor(tensor, key) for key, tensor in enumerate(tensors)]
    value = values[0] if tensors[0].stacked else _list(values)
    # As in torch's own files, checksums and sizes stand behind the bytes, since nothing is written twice.
    with zipfile.ZipFile(pieces, "w", zipfile.ZIP_STORED) as archive:
        # A ZipInfo has a fixed date, so the same tensors are the same bytes.
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), pickle.PROTO + b"\x02" + value + pickle.STOP)
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), "little")
        for key, tensor in enumerate(tensors):
            entry = zipfile.ZipInfo(f"archive/data/{key}")
            entry.file_size = tensor.nbytes  # tells whether the entry needs zip64
            with archive.open(entry, "w") as storage:
                for run in tensor.runs():
                    storage.write(run)
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


def _tensor(tensor: RowTensor, key: int) -> bytes:
    """Pickle `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())` in protocol 2."""
    strides = list(accumulate(reversed(tensor.shape[1:]), operator.mul, initial=1))[::-1]
    storage = (
        pickle.MARK
        + _string("storage")
        + _global(b"torch", _STORAGES[tensor.dtype])
        + _string(str(key))
        + _string("cpu")
        + _integer(math.prod(tensor.shape))
        + pickle.TUPLE
        + pickle.BINPERSID
    )
    arguments = (
        pickle.MARK
        + storage
        + _integer(0)
        + _tuple(tensor.shape)
        + _tuple(strides)
        + pickle.NEWFALSE
        + _global(b"collections", b"OrderedDict")
        + pickle.EMPTY_TUPLE
        + pickle.REDUCE
        + pickle.TUPLE
    )
    return _global(b"torch._utils", b"_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _list(values: Sequence[bytes]) -> bytes:
    return pickle.EMPTY_LIST + pickle.MARK + b"".join(values) + pickle.APPENDS


def _global(module: bytes, name: bytes) -> bytes:
    return pickle.GLOBAL + module + b"\n" + name + b"\n"


def _string(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    encoded = value.to_bytes(9, "little", signed=True)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


def _tuple(values: Sequence[int]) -> bytes:
    return pickle.MARK + b"".join(map(_integer, values)) + pickle.TUPLE
