"""From the encoder's tensors to what the rooms share, with the fault of one prompt kept to itself."""

from __future__ import annotations

import ml_dtypes
import torch

from encoder import Encoder, Encoding, PromptError
from jobs.records import EncoderInfo
from jobs.tensors import Array


def encode_each(encoder: Encoder, prompts: list[str]) -> list[Encoding | PromptError]:
    """Encode `prompts`; one that cannot be encoded gives its error, and does not touch the others."""
    results: dict[int, Encoding | PromptError] = {}
    waiting = list(range(len(prompts)))
    while waiting:
        try:
            encodings = encoder.encode([prompts[position] for position in waiting])
        except PromptError as exc:
            results[waiting.pop(exc.position)] = exc
        else:
            results.update(zip(waiting, encodings, strict=True))
            break
    return [results[position] for position in range(len(prompts))]


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
        dtype=str(encoder.dtype).removeprefix("torch."),
        device=str(encoder.device),
        fingerprint=encoder.fingerprint,
        random_weights=encoder.random_weights,
    )
