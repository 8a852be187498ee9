"""diffusers' own function and our encoder, on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers import Flux2Pipeline
from torch import nn
from transformers import AutoTokenizer, Mistral3Config, Mistral3ForConditionalGeneration

from encoder import Encoder, EncoderConfig, tiny
from encoder.attention import supports_varlen
from encoder.checkpoint import locate
from encoder.loading import empty_decoder
from encoder.prompts import PromptTokenizer


@dataclass(frozen=True)
class Contestants:
    """Who is compared.

    Attributes:
        description: of the model.
        reference: encodes prompts as `Flux2Pipeline` does -> `[B, 512, D]`.
        encoder: ours.
        deterministic: ours with that option, if it is asked for.
        linears: the weights of the matrix products of ours, by layer.
        reference_bytes: of the reference's weights.
        encoder_bytes: of ours.
        head_share: the vocabulary head's share of the reference's floating-point operations.
    """

    description: str
    reference: Callable[[list[str]], torch.Tensor]
    encoder: Encoder
    deterministic: Encoder | None
    linears: list[list[torch.Tensor]]
    reference_bytes: int
    encoder_bytes: int
    head_share: float

    @property
    def flops_per_row(self) -> float:
        """Floating-point operations of the matrix products for one row."""
        return 2.0 * sum(weight.numel() for layer in self.linears for weight in layer)


def load_tiny(folder: Path, hidden: int, *, deterministic: bool, device: str, **options: Any) -> Contestants:  # noqa: ANN401 - handed on
    """Write a small checkpoint, and let both load it."""
    tiny.write(folder, hidden=hidden)
    encoder = Encoder.load(folder, device=device, **options)
    model = Mistral3ForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=encoder.dtype).to(device)
    steady = Encoder.load(folder, device=device, deterministic=True, **options) if deterministic else None
    return _contestants(f"tiny, hidden {hidden}", model, folder, encoder, steady)


def load_shape(folder: Path, _hidden: int, *, deterministic: bool, device: str, **options: Any) -> Contestants:  # noqa: ANN401 - handed on
    """Make random weights in the shape of Mistral-Small-3.2, 24B, on the device; ours are the same tensors."""
    tiny.write(folder)  # for its tokenizer
    config = Mistral3Config.from_pretrained(folder / "text_encoder")
    for name, value in _MISTRAL_SMALL.items():
        setattr(config.text_config, name, value)
    config.save_pretrained(folder / "text_encoder")
    dtype = getattr(torch, options["dtype"] or "bfloat16")
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Mistral3ForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)

    def share(*, exact: bool) -> Encoder:
        preset, checkpoint = EncoderConfig.preset("flux2-dev"), locate(folder)
        module = empty_decoder(checkpoint, preset, dtype)
        weights = dict(model.model.language_model.named_parameters())
        for name, _ in list(module.named_parameters()):
            set_module_tensor_to_device(module, name, device, weights[name].data)
        return Encoder(
            module.to(device).eval().requires_grad_(requires_grad=False),
            PromptTokenizer(checkpoint.tokenizer(), preset),
            preset,
            checkpoint=checkpoint,
            fingerprint="benchmark",
            attention="varlen" if supports_varlen(torch.device(device), dtype, config.text_config.head_dim) else "sdpa",
            token_budget=options["token_budget"] or 4096,
            deterministic=exact,
        )

    steady = share(exact=True) if deterministic else None
    return _contestants("mistral-small-3.2, random weights", model, folder, share(exact=False), steady)


_MISTRAL_SMALL = {
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131072,
}


def _contestants(
    description: str, model: nn.Module, folder: Path, encoder: Encoder, deterministic: Encoder | None
) -> Contestants:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    decoder: Any = model.get_submodule("model.language_model")
    head: Any = model.get_submodule("lm_head")
    layers = [_linears(layer) for layer in decoder.layers]
    per_layer = sum(weight.numel() for weight in layers[0])
    used = layers[: encoder.config.layers[-1]]
    norms = sum(p.numel() for layer in decoder.layers[: len(used)] for p in layer.parameters() if p.ndim == 1)
    embedding = decoder.embed_tokens.weight
    return Contestants(
        description=description,
        reference=lambda prompts: Flux2Pipeline._get_mistral_3_small_prompt_embeds(model, tokenizer, prompts),
        encoder=encoder,
        deterministic=deterministic,
        linears=used,
        reference_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        encoder_bytes=(embedding.numel() + per_layer * len(used) + norms) * embedding.element_size(),
        head_share=head.weight.numel() / (head.weight.numel() + per_layer * len(layers)),
    )


def _linears(layer: nn.Module) -> list[torch.Tensor]:
    return [module.weight for module in layer.modules() if isinstance(module, nn.Linear)]
