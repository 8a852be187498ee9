"""One prompt at a time on the idle stack, with rows as wide as the real model's: D = 15360.

A checkpoint with the real model's hidden size, vocabulary and number of layers, but so few and narrow heads and such
small inner layers that two CPU cores encode a prompt within a tenth of a second. Everything around the encoder does
what it would do for the real one.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from transformers import Mistral3Config

from benchmarks import plain_service
from benchmarks.http_idle import ask_in_turn
from benchmarks.measure import spread
from benchmarks.stack import Stack
from encoder import EncoderConfig, tiny
from encoder.checkpoint import locate
from encoder.loading import empty_decoder

DTYPE = "bfloat16"  # the real model's
_SHAPE = {
    "hidden_size": 5120,
    "intermediate_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_ROUNDS = 15
_PLAIN_REPEATS = 3


def measure(prompt: str, formats: Sequence[str], device: str, dtype: str) -> dict[str, Any]:
    """Ask for `prompt` in each format in turn, and write the same tensor as the plain port does."""
    with tempfile.TemporaryDirectory(prefix="layerstack-benchmark-") as folder:
        checkpoint = Path(folder) / "checkpoint"
        write_checkpoint(checkpoint)
        with Stack(Path(folder), checkpoint, device, options=("--dtype", dtype)) as stack:
            idle = ask_in_turn(stack.url, [prompt], formats, _ROUNDS)
            tensors = load_tensors(stack.predict(prompt))
    plain_ms = [_plain_ms(tensors) for _ in range(_PLAIN_REPEATS)]
    for each in idle:
        each["plain_json_ratio"] = round(statistics.median(plain_ms) / each["over_encode_ms"][0], 1)
    return {
        "embed_dim": tensors["prompt_embeds"].shape[-1],
        "dtype": dtype,
        "plain_json_ms": spread(plain_ms),
        "idle": idle,
    }


def write_checkpoint(folder: Path) -> None:
    """Write the checkpoint, with random weights in bfloat16, of the tensors that our encoder reads alone."""
    tiny.write(folder)  # for its tokenizer
    text_encoder = folder / "text_encoder"
    config = Mistral3Config.from_pretrained(text_encoder)
    for name, value in _SHAPE.items():
        setattr(config.text_config, name, value)
    config.save_pretrained(text_encoder)
    module = empty_decoder(locate(folder), EncoderConfig.preset("flux2-dev"), torch.bfloat16)
    torch.manual_seed(0)
    tensors = {f"model.language_model.{name}": _weights(name, p.shape) for name, p in module.named_parameters()}
    save_file(tensors, text_encoder / "model.safetensors", {"format": "pt"})


def _weights(name: str, shape: torch.Size) -> torch.Tensor:
    """Draw a tensor of a scale that keeps hidden states near unit size."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = 1.0 if "embed_tokens" in name else shape[1] ** -0.5
    return torch.randn(shape, dtype=torch.bfloat16) * scale


def _plain_ms(tensors: dict[str, torch.Tensor]) -> float:
    started = time.perf_counter()
    plain_service.answer(tensors["prompt_embeds"], tensors["text_ids"], 0.0)
    return 1e3 * (time.perf_counter() - started)
