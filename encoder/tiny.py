"""A small checkpoint with random weights, for machines without the real one.

    python -m encoder.tiny DIR [--family mistral3] [--hidden 64]

It has the layout of FLUX.2, and the real model's number of layers and proportions. `DIR/text_encoder` loads with
`Mistral3ForConditionalGeneration.from_pretrained` (40 layers, as FLUX.2-dev has them) or
`Qwen3ForCausalLM.from_pretrained` (36 layers, as FLUX.2-klein has them), `DIR/tokenizer` with
`AutoTokenizer.from_pretrained`. The vocabulary is the real Tekken one (from the mistral-common package), for Qwen3 with
Qwen's own special tokens added to it. The same arguments write the same bytes every time.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any, Literal, get_args

import mistral_common
import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import (
    AddedToken,
    AutoConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

_TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
Family = Literal["mistral3", "qwen3"]
_HEADS, _KV_HEADS = 8, 2
# The chat format of Mistral-Small-3 for one system message and one user message, as content lists or as strings.
_MISTRAL_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['content'] is string %}
        {%- set text = message['content'] %}
    {%- else %}
        {%- set text = message['content'] | map(attribute='text') | join %}
    {%- endif %}
    {%- if message['role'] == 'system' %}
        {{- '[SYSTEM_PROMPT]' + text + '[/SYSTEM_PROMPT]' }}
    {%- elif message['role'] == 'user' %}
        {{- '[INST]' + text + '[/INST]' }}
    {%- else %}
        {{- text + eos_token }}
    {%- endif %}
{%- endfor %}
"""

# The chat format of Qwen3 for messages whose content is a string; without thinking it ends in an empty thinking block.
_QWEN_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
_QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def write(folder: Path, hidden: int = 64, seed: int = 0, family: Family = "mistral3") -> None:
    """Write the checkpoint to `folder`, which appears only once it is complete.

    Args:
        folder: must not exist yet.
        hidden: hidden size, a multiple of 16.
        seed: of the random weights.
        family: "mistral3" or "qwen3".

    Raises:
        ValueError: `hidden` is not a positive multiple of 16.
        FileExistsError: `folder` exists.
    """
    if hidden < 1 or hidden % (2 * _HEADS):
        raise ValueError(f"hidden must be a positive multiple of {2 * _HEADS}, not {hidden}")
    if folder.exists():
        raise FileExistsError(f"{folder} exists already")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        if family == "qwen3":
            _write_text_encoder(unfinished / "text_encoder", _qwen3_config(hidden), Qwen3ForCausalLM, seed)
        else:
            config = _mistral3_config(hidden)
            _write_text_encoder(unfinished / "text_encoder", config, Mistral3ForConditionalGeneration, seed)
        _write_tokenizer(unfinished / "tokenizer", family)
        unfinished.chmod(0o755)  # mkdtemp makes it private; a checkpoint is not
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _mistral3_config(hidden: int) -> PreTrainedConfig:
    return Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": 131072,
            # Mistral-Small-3: 32768 for 5120.
            **_decoder_shape(hidden, intermediate=round(6.4 * hidden)),
            "num_hidden_layers": 40,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
            "sliding_window": None,
            "max_position_embeddings": 131072,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=10,
        tie_word_embeddings=False,
        architectures=["Mistral3ForConditionalGeneration"],
        dtype="float32",
    )


def _qwen3_config(hidden: int) -> PreTrainedConfig:
    return Qwen3Config(
        vocab_size=131072 + 8 * math.ceil(len(_QWEN_TOKENS) / 8),
        # Qwen3-4B: 9728 for 2560.
        **_decoder_shape(hidden, intermediate=round(3.8 * hidden)),
        num_hidden_layers=36,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
        dtype="float32",
    )


def _decoder_shape(hidden: int, *, intermediate: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": math.ceil(intermediate / 8) * 8,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": hidden // _HEADS,
    }


def _write_text_encoder(folder: Path, config: PreTrainedConfig, architecture: type[PreTrainedModel], seed: int) -> None:
    config.layerstack_random_weights = True
    with torch.device("meta"):
        shapes = {key: tuple(t.shape) for key, t in architecture(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]  # as published: the embedding is stored once
    folder.mkdir()
    weights = folder / "model.safetensors"
    save_file({key: _weights(key, shape, seed) for key, shape in shapes.items()}, weights, {"format": "pt"})
    weights.chmod(0o644)  # safetensors writes it for its owner alone; a container runs as somebody else
    config.save_pretrained(folder)
    AutoConfig.from_pretrained(folder)  # fails here rather than in a server's start


def _weights(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Draw a tensor whose scale keeps hidden states near unit size through all layers, so that every layer counts."""
    if "norm" in key:
        return np.ones(shape, dtype=np.float32)
    # NumPy's generators give the same numbers on every machine, and a generator a tensor makes the order irrelevant.
    generator = np.random.default_rng([seed, zlib.crc32(key.encode())])
    scale = 1.0 if "embed_tokens" in key else 1.0 / math.sqrt(math.prod(shape[1:]))
    return generator.standard_normal(shape, dtype=np.float32) * np.float32(scale)


def _write_tokenizer(folder: Path, family: Family) -> None:
    tokenizer = convert_tekken_tokenizer(str(_TEKKEN))
    if family == "qwen3":
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in _QWEN_TOKENS])
    tokenizer.chat_template = _QWEN_TEMPLATE if family == "qwen3" else _MISTRAL_TEMPLATE
    tokenizer.pad_token = "<|endoftext|>" if family == "qwen3" else "<pad>"
    # Only init_kwargs are saved.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right" if family == "qwen3" else "left"
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m encoder.tiny", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--family", choices=get_args(Family), default="mistral3", help="which model (default mistral3)")
    parser.add_argument("--hidden", type=int, default=64, help="hidden size, a multiple of 16 (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    args = parser.parse_args()
    try:
        write(args.folder, args.hidden, args.seed, args.family)
    except (ValueError, FileExistsError) as exc:
        parser.error(str(exc))
    print(f"{args.folder}: a {args.family} checkpoint with RANDOM weights, hidden size {args.hidden}")


if __name__ == "__main__":
    main()
