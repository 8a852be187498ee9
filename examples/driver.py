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
# What a row may be away, relative to its norm: 16 bits are rounded differently in another batch or on another card.
_ALLOWED = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


def main() -> int:
    """Return 0 if both tensors are the same for all prompts, 1 if not."""
    parser = argparse.ArgumentParser(description="Compare a server's embeddings with local ones.")
    parser.add_argument("url", help="of the server")
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--subfolder", help="where in the folder or repository the model is")
    parser.add_argument("--prompts", type=Path, help="a file, one prompt a line; default three prompts of its own")
    options = parser.parse_args()
    prompts = options.prompts.read_text("utf-8").splitlines() if options.prompts else _PROMPTS
    if not prompts:
        parser.error(f"--prompts: {options.prompts} is empty")
    with layerstack.Client(options.url) as client:
        remote = client.encoder()
        encoder = Encoder.load(
            options.model, remote.preset, revision=options.revision, subfolder=options.subfolder, dtype=remote.dtype
        )
        try:
            errors = torch.cat([compare(client, encoder, some) for some in _cut(prompts)])
        except AssertionError as exc:
            print(f"NOT the same: {exc}")
            return 1
    same_model = remote.fingerprint == encoder.fingerprint
    # Not `errors > allowed`, which a NaN would pass.
    wrong = int((~(errors <= _ALLOWED[remote.dtype])).sum())
    print(f"fingerprint: {remote.fingerprint} there, {encoder.fingerprint} here")
    print(f"rows: {wrong} of {errors.numel()} differ; the largest relative difference is {float(errors.max()):.1e}")
    print("the same" if same_model and not wrong else f"NOT the same, in {remote.dtype}")
    return 0 if same_model and not wrong else 1


def compare(client: layerstack.Client, encoder: Encoder, prompts: list[str]) -> torch.Tensor:
    """Return how far each row is from ours, relative to its norm: `[B, max_length]`.

    Raises:
        AssertionError: the shapes, or `text_ids`, differ.
    """
    answer = client.predict(prompts)
    prompt_embeds, text_ids = encoder.dense(encoder.encode(prompts))
    torch.testing.assert_close(torch.from_numpy(answer.text_ids), text_ids.cpu(), rtol=0, atol=0)
    return row_errors(torch.from_numpy(answer.prompt_embeds.astype("float32")), prompt_embeds.float().cpu())


def row_errors(there: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """Return the norm of the difference of each row, relative to the norm of the row here."""
    if there.shape != here.shape:
        raise AssertionError(f"prompt_embeds: {tuple(there.shape)} there, {tuple(here.shape)} here")
    return (there - here).norm(dim=-1) / here.norm(dim=-1)


def _cut(prompts: list[str]) -> list[list[str]]:
    return [prompts[begin : begin + _AT_A_TIME] for begin in range(0, len(prompts), _AT_A_TIME)]


if __name__ == "__main__":
    sys.exit(main())
