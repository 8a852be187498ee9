"""Compare what a server answers with what this machine computes from the same model: `layerstack verify` as a script.

    python examples/driver.py https://name.endpoints.huggingface.cloud black-forest-labs/FLUX.2-dev --prompts FILE

Needs the extras `api` and `worker`, and a machine that can hold the model. The key of the server, or the token of the
endpoint, is read from LAYERSTACK_API_KEY.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import layerstack
from encoder import Encoder
from jobs.settings import load_settings
from layerstack.errors import PromptFileError
from layerstack.localencoder import read_prompts
from layerstack.verification import PROMPTS, Comparison

AT_A_TIME = 4


def main() -> int:
    """Return 0 if both tensors are the same for all prompts, 1 if not."""
    parser = argparse.ArgumentParser(description="Compare a server's embeddings with local ones.")
    parser.add_argument("url", help="of the server")
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--subfolder", help="where in the folder or repository the model is")
    parser.add_argument(
        "--prompts", type=Path, help="a file as `layerstack encode` takes it; default a few prompts of its own"
    )
    options = parser.parse_args()
    prompts = list(PROMPTS)
    if options.prompts:
        try:
            prompts = [each.prompt for each in read_prompts(options.prompts, load_settings())]
        except (PromptFileError, OSError) as exc:
            parser.error(f"--prompts: {exc}")
        if not prompts:
            parser.error(f"--prompts: {options.prompts} is empty")
    with layerstack.Client(options.url) as client:
        remote = client.encoder()
        encoder = Encoder.load(
            options.model, remote.preset, revision=options.revision, subfolder=options.subfolder, dtype=remote.dtype
        )
        comparison = compare(client, encoder, prompts)
    for layer in comparison.layers:
        print(f"layer {layer.layer}: largest error of a value {layer.absolute:.1e}, mean of a row {layer.relative:.1e}")
    print("\n".join(comparison.differences) or f"the same, {comparison.rows} rows in {remote.dtype}")
    return 1 if comparison.differences else 0


def compare(client: layerstack.Client, encoder: Encoder, prompts: Sequence[str]) -> Comparison:
    """Compare `prompt_embeds [B, L, D]` and `text_ids [B, L, 4]` of all prompts, a few at a time."""
    comparison = Comparison(encoder.config.layers, str(encoder.dtype).removeprefix("torch."))
    for begin in range(0, len(prompts), AT_A_TIME):
        some = list(prompts[begin : begin + AT_A_TIME])
        there = client.predict(some)
        prompt_embeds, text_ids = encoder.dense(encoder.encode(some))
        here = prompt_embeds.float().cpu().numpy(), text_ids.cpu().numpy()  # numpy has no bfloat16
        comparison.add(some, here, (there.prompt_embeds, there.text_ids))
        comparison.expect("fingerprint", encoder.fingerprint, there.fingerprint)
    return comparison


if __name__ == "__main__":
    sys.exit(main())
