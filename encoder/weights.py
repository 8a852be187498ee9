"""Reading tensors of a checkpoint straight to where they stay.

`safetensors.safe_open` maps a file into memory: its pages count as the process's own until it is closed, the kernel
reads ahead into tensors that nobody asked for, and a tensor of another dtype or device is held twice. Here each tensor
is read in pieces of some megabytes into its final place, and hashed on the way, so that what is in memory is what is
kept, and what is read is what is needed. The library still opens and checks every file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from encoder.errors import CheckpointError

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_PIECE_BYTES = 4 * 2**20
_THREADS = 4


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are.

    Attributes:
        path: the safetensors file.
        key: the tensor's name in it.
        dtype: of the stored values.
        shape: of the tensor.
        offset: of the first byte in the file.
    """

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def stored_tensors(path: Path, keys: set[str]) -> dict[str, StoredTensor]:
    """Find the tensors called `keys` in a safetensors file, reading nothing but its header.

    Raises:
        CheckpointError: the file is damaged or lacks one of them, or one is stored in a dtype of quantized weights.
    """
    try:
        with safe_open(path, framework="pt") as file:  # checks the header against the file's size
            absent = sorted(keys - set(file.keys()))
        with path.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_size))
    except (SafetensorError, OSError, ValueError) as exc:
        raise CheckpointError(f"{path} is damaged: {exc}") from exc
    if absent:
        raise CheckpointError(f"{path}: {len(absent)} tensors are missing, among them {absent[:3]}")
    for key in sorted(keys):
        if header[key]["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{path}: tensor {key!r} is {header[key]['dtype']}: quantized, not supported; {', '.join(_DTYPES)} are"
            )
    return {
        key: StoredTensor(
            path,
            key,
            _DTYPES[header[key]["dtype"]],
            tuple(header[key]["shape"]),
            8 + header_size + header[key]["data_offsets"][0],
        )
        for key in keys
    }


def read_tensors(tensors: Mapping[str, StoredTensor], targets: Mapping[str, torch.Tensor]) -> str:
    """Fill each of `targets` with the stored tensor of the same name, in the target's own dtype and on its device.

    Returns:
        SHA-256 over names and stored values, the same however the checkpoint is divided into files.

    Raises:
        CheckpointError: a tensor has another shape than its target, or cannot be read.
    """
    for name, stored in tensors.items():
        if stored.shape != tuple(targets[name].shape):
            raise CheckpointError(
                f"{stored.path}: tensor {stored.key!r} has the shape {list(stored.shape)}, "
                f"the model needs {list(targets[name].shape)}"
            )
    names = sorted(tensors)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda name: _read(tensors[name], targets[name]), names))
    described = [f"{name} {tensors[name].dtype} {digest}" for name, digest in zip(names, digests, strict=True)]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()


def _read(stored: StoredTensor, target: torch.Tensor) -> str:
    digest = hashlib.sha256()
    flat = target.view(-1)
    step = _PIECE_BYTES // stored.dtype.itemsize
    in_place = target.device.type == "cpu" and target.dtype == stored.dtype
    piece = torch.empty(0 if in_place else min(step, len(flat)), dtype=stored.dtype)
    try:
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            for start in range(0, len(flat), step):
                part = flat[start : start + step]
                values = part if in_place else piece[: len(part)]
                content = values.view(torch.uint8).numpy().data
                _read_fully(file, content)
                digest.update(content)
                if not in_place:
                    part.copy_(values)
    except OSError as exc:
        raise CheckpointError(f"{stored.path}: tensor {stored.key!r} cannot be read: {exc}") from exc
    return digest.hexdigest()


def _read_fully(file: FileIO, content: memoryview) -> None:
    while content:
        count = file.readinto(content)
        if not count:
            raise OSError("the file ends too early")
        content = content[count:]
