"""Make a picture with FLUX.2 on a card that cannot hold its text encoder: a server sends `prompt_embeds`.

    python examples/flux2_pipeline.py "a fox in the snow" --url http://gpu-box:7860 --out fox.png

Needs diffusers 0.40 or later. The model's own text encoder is neither loaded nor downloaded here; it is what the server
must run. The transformer of FLUX.2-dev takes 64 GB in bfloat16. On a card with less, either

    --model diffusers/FLUX.2-dev-bnb-4bit --offload model     4 bits, for 24 GB and bitsandbytes; not tried by the tests
    --offload group                                           layer by layer out of the machine's memory, slowly

The key of the server is read from LAYERSTACK_API_KEY.
"""

from __future__ import annotations

import argparse
import sys

import torch
from diffusers import Flux2Pipeline, Flux2Transformer2DModel

import layerstack


def main() -> None:
    """Write the picture of a prompt."""
    options = _options()
    dtype = getattr(torch, options.dtype)
    # First what takes a moment: whether the server answers, and whether its encoder fits, before the weights load.
    prompt_embeds = embeddings_of(options.prompt, options.url, options.model)
    # The pipeline takes whatever text encoder it is given, none included; it makes the `text_ids` itself.
    pipeline = Flux2Pipeline.from_pretrained(options.model, text_encoder=None, tokenizer=None, dtype=dtype)
    place(pipeline, options.offload, options.device)
    picture = pipeline(
        prompt_embeds=prompt_embeds.to(options.device, dtype),
        height=options.height,
        width=options.width,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        # On the CPU a seed gives the same noise whatever the card.
        generator=torch.Generator("cpu").manual_seed(options.seed),
    ).images[0]
    picture.save(options.out)
    print(f"{options.out}: {picture.width} x {picture.height}, {options.steps} steps, seed {options.seed}")


def place(pipeline: Flux2Pipeline, offload: str, device: str) -> None:
    """Bring transformer and VAE to `device`: both at once, one after the other, or layer by layer."""
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "group":
        pipeline.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")
    else:
        pipeline.to(device)


def embeddings_of(prompt: str, url: str | None, model: str) -> torch.Tensor:
    """Ask the server for `prompt_embeds [1, 512, D]`; exits if the model's transformer takes another D."""
    with layerstack.Client(url) as client:
        prompt_embeds, _text_ids = client.predict(prompt).torch()
    wanted = Flux2Transformer2DModel.load_config(model, subfolder="transformer")["joint_attention_dim"]
    if prompt_embeds.shape[-1] != wanted:
        raise SystemExit(
            f"the server's encoder gives {prompt_embeds.shape[-1]} values a token, {model} takes {wanted}: "
            "start the server with the text encoder of this model"
        )
    return prompt_embeds


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a picture with FLUX.2, its text encoder being on a server.")
    parser.add_argument("prompt")
    parser.add_argument("--url", help="of the server; default LAYERSTACK_URL, or this machine")
    parser.add_argument(
        "--model", default="black-forest-labs/FLUX.2-dev", help="hub id, or folder with transformer, vae and scheduler"
    )
    parser.add_argument("--out", default="picture.png", help="where the picture goes (default picture.png)")
    parser.add_argument("--steps", type=int, default=50, help="of denoising (default 50)")
    parser.add_argument("--guidance", type=float, default=4.0, help="how closely to follow the prompt (default 4.0)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise that it starts from (default 0)")
    parser.add_argument("--height", type=int, default=1024, help="in pixels (default 1024)")
    parser.add_argument("--width", type=int, default=1024, help="in pixels (default 1024)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--offload",
        choices=["none", "model", "group"],
        default="none",
        help="keep weights in the machine's memory, and bring them to the device by model or by layer (default none)",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except layerstack.LayerstackError as exc:
        sys.exit(str(exc))
