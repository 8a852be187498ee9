"""From the encoder's tensors to what the rooms share."""

from __future__ import annotations

import ml_dtypes
import torch

from encoder import Encoder
from jobs.records import EncoderInfo
from jobs.tensors import Array


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return a tensor's values; numpy has bfloat16 by ml_dtypes only, so those travel as 16-bit integers."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    array: Array = tensor.numpy()
    return array


def describe(encoder: Encoder) -> EncoderInfo:
    """Return what api and client are told of `encoder`."""
    return EncoderInfo(
        model=encoder.model,
        revision=encoder.revision,
        preset=encoder.config.name,
        layers=encoder.config.layers,
        max_length=encoder.config.max_length,
        embed_dim=encoder.embed_dim,
        num_prefix_tokens=len(encoder.prefix_rows),
        padding_side=encoder.config.padding_side,
        dtype=str(encoder.dtype).removeprefix("torch."),
        device=str(encoder.device),
        fingerprint=encoder.fingerprint,
        random_weights=encoder.random_weights,
    )
