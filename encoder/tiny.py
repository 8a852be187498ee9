"""A small Mistral-3 checkpoint with random weights, for machines without the real one.

    python -m encoder.tiny DIR [--hidden 64]

It has 40 layers, the real Tekken vocabulary (from the mistral-common package) and the layout of FLUX.2-dev:
`DIR/text_encoder` loads with `Mistral3ForConditionalGeneration.from_pretrained`, `DIR/tokenizer` with
`AutoTokenizer.from_pretrained`. The same arguments write the same bytes every time.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import zlib
from pathlib import Path

import mistral_common
import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig, Mistral3Config, Mistral3ForConditionalGeneration
from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

_TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
_HEADS, _KV_HEADS = 4, 2
# The chat format of Mistral-Small-3 for one system message and one user message, as content lists or as strings.
_CHAT_TEMPLATE = """\
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


def write(folder: Path, hidden: int = 64, seed: int = 0) -> None:
    """Write the checkpoint to `folder`, which appears only once it is complete.

    Args:
        folder: must not exist yet.
        hidden: hidden size, a multiple of 8.
        seed: of the random weights.

    Raises:
        ValueError: `hidden` is not a positive multiple of 8.
        FileExistsError: `folder` exists.
    """
    if hidden < 1 or hidden % (2 * _HEADS):
        raise ValueError(f"hidden must be a positive multiple of {2 * _HEADS}, not {hidden}")
    if folder.exists():
        raise FileExistsError(f"{folder} exists already")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_text_encoder(unfinished / "text_encoder", hidden, seed)
        _write_tokenizer(unfinished / "tokenizer")
        unfinished.chmod(0o755)  # mkdtemp makes it private; a checkpoint is not
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_text_encoder(folder: Path, hidden: int, seed: int) -> None:
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": 131072,
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": 40,
            "num_attention_heads": _HEADS,
            "num_key_value_heads": _KV_HEADS,
            "head_dim": hidden // _HEADS,
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
    config.layerstack_random_weights = True
    with torch.device("meta"):
        shapes = {key: tuple(t.shape) for key, t in Mistral3ForConditionalGeneration(config).state_dict().items()}
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


def _write_tokenizer(folder: Path) -> None:
    tokenizer = convert_tekken_tokenizer(str(_TEKKEN))
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.pad_token = "<pad>"  # noqa: S105 - a token of the vocabulary, not a secret
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # only init_kwargs are saved
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m encoder.tiny", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--hidden", type=int, default=64, help="hidden size, a multiple of 8 (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    args = parser.parse_args()
    try:
        write(args.folder, args.hidden, args.seed)
    except (ValueError, FileExistsError) as exc:
        parser.error(str(exc))
    print(f"{args.folder}: a Mistral-3 checkpoint with RANDOM weights, hidden size {args.hidden}")


if __name__ == "__main__":
    main()
