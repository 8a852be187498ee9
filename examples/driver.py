"""Compare what a server answers with what this machine computes from the same model.

    python examples/driver.py https://name.endpoints.huggingface.cloud black-forest-labs/FLUX.2-dev --prompts FILE

Needs the extra `worker`, and a machine that can hold the model. The key of the server, or the token of the endpoint, is
read from LAYERSTACK_API_KEY.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import layerstack
from encoder import Encoder

_PROMPTS = ["a fox in the snow", "an old lighthouse keeper reads a map by candlelight", ""]
_AT_A_TIME = 4
# Of the norm of a prompt's embeddings: bfloat16 and float16 round differently in another batch or on another card.
_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


def main() -> int:
    """Return 0 if both tensors are the same for all prompts, 1 if not."""
    parser = argparse.ArgumentParser(description="Compare a server's embeddings with local ones.")
    parser.add_argument("url", help="of the server")
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--prompts", type=Path, help="a file, one prompt a line; default three prompts of its own")
    options = parser.parse_args()
    prompts = options.prompts.read_text("utf-8").splitlines() if options.prompts else _PROMPTS
    with layerstack.Client(options.url) as client:
        remote = client.encoder()
        encoder = Encoder.load(options.model, remote.preset, dtype=remote.dtype)
        print(f"fingerprints: {remote.fingerprint} there, {encoder.fingerprint} here")
        largest = max(
            difference(client, encoder, prompts[begin : begin + _AT_A_TIME])
            for begin in range(0, len(prompts), _AT_A_TIME)
        )
    same = remote.fingerprint == encoder.fingerprint and largest <= _TOLERANCE[remote.dtype]
    print(f"{len(prompts)} prompts in {remote.dtype}: relative difference at most {largest:.1e}; {_verdict(same)}")
    return 0 if same else 1


def difference(client: layerstack.Client, encoder: Encoder, prompts: list[str]) -> float:
    """Return the largest distance of a prompt's embeddings, relative to their norm; infinite if `text_ids` differ."""
    answer = client.predict(prompts)
    prompt_embeds, text_ids = encoder.dense(encoder.encode(prompts))
    there = torch.from_numpy(answer.prompt_embeds.astype("float32")).flatten(1)
    here = prompt_embeds.float().cpu().flatten(1)
    if not torch.equal(torch.from_numpy(answer.text_ids), text_ids.cpu()):
        return float("inf")
    return float(((there - here).norm(dim=1) / here.norm(dim=1)).max())


def _verdict(same: bool) -> str:
    return "the same" if same else "NOT the same"


if __name__ == "__main__":
    sys.exit(main())
