"""Ask a server for the embeddings of a prompt, twice, and look at what comes back.

    python examples/client.py "a fox in the snow" --url http://127.0.0.1:7860

Needs torch beside the client. Both answers must be the same. A key, if the server has any, is read from
LAYERSTACK_API_KEY.
"""

from __future__ import annotations

import argparse
import sys

import torch

import layerstack


def main() -> None:
    """Print shapes, dtype, tokens, and how much of a dense prompt is its own."""
    parser = argparse.ArgumentParser(description="Ask a server for the embeddings of a prompt, twice.")
    parser.add_argument("prompt", nargs="?", default="a fox in the snow")
    parser.add_argument("--url", help="of the server; default LAYERSTACK_URL, or this machine")
    options = parser.parse_args()
    with layerstack.Client(options.url) as client:
        answer = client.predict([options.prompt, options.prompt])
    pe, text_ids = answer.torch()  # (2, 512, D), (2, 512, 4)
    torch.testing.assert_close(pe[0], pe[1], rtol=1e-4, atol=1e-4)
    print(f"prompt_embeds {tuple(pe.shape)} {pe.dtype}, text_ids {tuple(text_ids.shape)} {text_ids.dtype}")
    print(f"num_tokens {answer.num_tokens}, truncated {answer.truncated}, fingerprint {answer.fingerprint}")
    own, dense = answer.own_rows[0].nbytes, pe[0].nbytes
    rows = f"{len(answer.own_rows[0])} own rows of {pe.shape[1]}"
    print(f"{rows}: {own:,} bytes, where the dense prompt has {dense:,}, {dense / own:.1f} times as many")


if __name__ == "__main__":
    try:
        main()
    except layerstack.LayerstackError as exc:
        sys.exit(str(exc))
