"""Let diffusers' own remote text encoder step ask a server of yours: nothing but its address changes.

    python examples/diffusers_remote_step.py "a fox in the snow" --url http://127.0.0.1:7860
    python examples/diffusers_remote_step.py "a fox in the snow" --model black-forest-labs/FLUX.2-dev --out fox.png

Needs diffusers 0.40 or later, and nothing of layerstack here. The first prints the shape of `prompt_embeds`; the second
also makes a picture with the modular pipeline, whose text encoder is then the remote one. As its key, the step sends
the token of Hugging Face that it finds: put HF_TOKEN=KEY before the command to send a key of your server instead.
"""

from __future__ import annotations

import argparse
import os
import sys

import requests
import torch
from diffusers.modular_pipelines.flux2.encoders import Flux2RemoteTextEncoderStep
from diffusers.modular_pipelines.flux2.modular_blocks_flux2 import Flux2AutoBlocks


def main() -> None:
    """Print the shape of what the step gets, and write a picture if a model is named."""
    options = _options()
    # The step reads the bytes of a tensor saved by torch.
    Flux2RemoteTextEncoderStep.REMOTE_URL = f"{options.url.rstrip('/')}/predict?format=pt"
    prompt_embeds = Flux2RemoteTextEncoderStep().init_pipeline()(prompt=options.prompt, output="prompt_embeds")
    print(f"prompt_embeds {tuple(prompt_embeds.shape)} {prompt_embeds.dtype}")
    if options.save:
        torch.save(prompt_embeds, options.save)
    if options.model:
        draw(options)


def draw(options: argparse.Namespace) -> None:
    """Run the whole modular pipeline, in which the step stands where the local text encoder was."""
    blocks = Flux2AutoBlocks()
    blocks.sub_blocks["text_encoder"] = Flux2RemoteTextEncoderStep()
    pipeline = blocks.init_pipeline(options.model)
    pipeline.load_components(dtype=getattr(torch, options.dtype))
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    picture = pipeline(
        prompt=options.prompt,
        num_inference_steps=options.steps,
        height=options.size,
        width=options.size,
        generator=torch.Generator("cpu").manual_seed(options.seed),
        output="images",
    )[0]
    picture.save(options.out)
    print(f"{options.out}: {picture.width} x {picture.height}, {options.steps} steps, seed {options.seed}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Let diffusers' remote text encoder step ask a server of yours.")
    parser.add_argument("prompt")
    parser.add_argument(
        "--url",
        default=os.environ.get("LAYERSTACK_URL", "http://127.0.0.1:7860"),
        help="of the server; default LAYERSTACK_URL, or this machine",
    )
    parser.add_argument("--save", help="a file for the tensor, which torch.load reads")
    parser.add_argument("--model", help="hub id, or folder with transformer, vae and scheduler, to make a picture")
    parser.add_argument("--out", default="picture.png", help="where the picture goes (default picture.png)")
    parser.add_argument("--steps", type=int, default=50, help="of denoising (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise that it starts from (default 0)")
    parser.add_argument("--size", type=int, default=1024, help="pixels of a side (default 1024)")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="that of the server's encoder"
    )
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except requests.ConnectionError:
        sys.exit(f"no answer from {Flux2RemoteTextEncoderStep.REMOTE_URL}; is the server running?")
    except requests.HTTPError as exc:
        sys.exit(f"{exc}: {exc.response.text}")
