"""A tensor as `torch.save` would write it, without torch.

The file is an uncompressed zip with a short pickle that names the tensor's storage, and the storage's bytes. The
pickle is written opcode by opcode: the standard library's pickler would have to import the torch globals it names.
Format: torch/serialization.py, `_save` and `_legacy_load`'s successor `_load`, version 3.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile

import numpy as np

from jobs.tensors import Array

_STORAGES = {"bfloat16": b"BFloat16Storage", "float16": b"HalfStorage", "float32": b"FloatStorage"}


def save_tensor(tensor: Array) -> bytes:
    """Return bytes that `torch.load(..., weights_only=True)` reads as `tensor`.

    Raises:
        KeyError: the dtype is none of bfloat16, float16 and float32.
    """
    contiguous = np.ascontiguousarray(tensor)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickle(contiguous))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", contiguous.reshape(-1).view(np.uint8).data)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def _pickle(tensor: Array) -> bytes:
    """Pickle `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())` in protocol 2."""
    strides = [stride // tensor.itemsize for stride in tensor.strides]
    storage = (
        pickle.MARK
        + _string("storage")
        + _global(b"torch", _STORAGES[tensor.dtype.name])
        + _string("0")
        + _string("cpu")
        + _integer(tensor.size)
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
    rebuilt = _global(b"torch._utils", b"_rebuild_tensor_v2") + arguments + pickle.REDUCE
    return pickle.PROTO + b"\x02" + rebuilt + pickle.STOP


def _global(module: bytes, name: bytes) -> bytes:
    return pickle.GLOBAL + module + b"\n" + name + b"\n"


def _string(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    encoded = value.to_bytes(9, "little", signed=True)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


def _tuple(values: list[int] | tuple[int, ...]) -> bytes:
    return pickle.MARK + b"".join(map(_integer, values)) + pickle.TUPLE
