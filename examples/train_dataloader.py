"""Train on embeddings that a job made: `layerstack.read` in a DataLoader, no text encoder and no server.

    layerstack jobs submit examples/prompts.txt
    layerstack jobs watch && layerstack jobs fetch -o captions
    python examples/train_dataloader.py captions --batch-size 8 --workers 2 --layout own_rows

The model is a toy, and noise of its own for each caption stands for the picture's latents; the rest is what a real
training script has. Rows that the job could not encode are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import layerstack

_LATENT_DIM = 16
_WIDTH = 128


class ToyDenoiser(nn.Module):
    """Guesses which way a noisy latent came, from the latent, the time and the rows of its prompt."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        # Some channels of a language model's hidden states are hundreds of times as large as the rest.
        self.rows = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, _WIDTH))
        self.guess = nn.Sequential(
            nn.Linear(_WIDTH + _LATENT_DIM + 1, 2 * _WIDTH), nn.GELU(), nn.Linear(2 * _WIDTH, _LATENT_DIM)
        )

    def forward(
        self, noisy: torch.Tensor, time: torch.Tensor, prompt_embeds: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return the velocity `[B, _LATENT_DIM]` of `noisy [B, _LATENT_DIM]` at `time [B, 1]`.

        Args:
            noisy: between latents and noise.
            time: 0 is the latents, 1 the noise.
            prompt_embeds: `[B, L, D]`.
            mask: `[B, L]`, False where `collate` has filled up; of dense rows all True, pad rows included, as in FLUX.
        """
        rows = self.rows(prompt_embeds).masked_fill(~mask.unsqueeze(-1), float("-inf"))  # (B, L, _WIDTH)
        velocity: torch.Tensor = self.guess(torch.cat([rows.amax(dim=1), noisy, time], dim=-1))
        return velocity


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Put rows together: `prompt_embeds [B, L, D]`, `mask [B, L]`, `latents [B, _LATENT_DIM]`.

    Dense rows are all of one length; own rows are padded to the longest of the batch.
    """
    embeds = [row["prompt_embeds"] for row in rows]
    return {
        "prompt_embeds": pad_sequence(embeds, batch_first=True),
        "mask": pad_sequence([torch.ones(len(each), dtype=torch.bool) for each in embeds], batch_first=True),
        "latents": torch.stack([latents_of(row["index"]) for row in rows]),
    }


def latents_of(index: int) -> torch.Tensor:
    """Stand for the latents that the VAE made of the picture with this caption; real ones are found by `row["id"]`."""
    return torch.randn(_LATENT_DIM, generator=torch.Generator().manual_seed(index))


def main() -> None:
    """Train for some steps, and print the loss on the way."""
    options = _options()
    torch.manual_seed(0)
    device = torch.device(options.device)
    rows = layerstack.read(options.folder, layout=options.layout, skip_failed=True)
    loader = DataLoader(
        rows,
        batch_size=options.batch_size,
        shuffle=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        pin_memory=device.type == "cuda",
        collate_fn=collate,
    )
    model = ToyDenoiser(rows.header.embed_dim).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    print(f"{len(rows)} rows of fingerprint {rows.fingerprint}, on {device}")
    losses = []
    for step, batch in enumerate(islice(forever(loader), options.steps), start=1):
        loss = flow_loss(model, {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % max(1, options.steps // 10) == 0:
            shape, dtype = tuple(batch["prompt_embeds"].shape), batch["prompt_embeds"].dtype
            print(f"step {step}: loss {losses[-1]:.3f}, prompt_embeds {shape} {dtype}")
    tenth = max(1, len(losses) // 10)
    print(f"loss {sum(losses[:tenth]) / tenth:.3f} at first, {sum(losses[-tenth:]) / tenth:.3f} at last")


def flow_loss(model: ToyDenoiser, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the error of the guessed velocity, as in the training of FLUX: noise minus latents."""
    latents = batch["latents"]
    noise, time = torch.randn_like(latents), torch.rand(len(latents), 1, device=latents.device)
    noisy = (1 - time) * latents + time * noise
    # The embeddings stay in the 16 bits they are stored in; autocast takes the rest there where it is safe.
    with torch.autocast(latents.device.type, torch.bfloat16):
        velocity = model(noisy, time, batch["prompt_embeds"], batch["mask"])
    return nn.functional.mse_loss(velocity.float(), noise - latents)


def forever(loader: DataLoader[dict[str, Any]]) -> Iterator[dict[str, torch.Tensor]]:
    """Go through the rows again and again, in another order each time."""
    while True:
        yield from loader


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a toy on the embeddings of a job.")
    parser.add_argument("folder", help="of a job: what `layerstack jobs fetch` or `layerstack encode` wrote")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts a step (default 8)")
    parser.add_argument("--workers", type=int, default=2, help="that read rows beside the training (default 2)")
    parser.add_argument("--steps", type=int, default=200, help="of training (default 200)")
    parser.add_argument(
        "--layout",
        choices=["dense", "own_rows"],
        default="dense",
        help="dense: all 512 rows, as FLUX is given them; own_rows: those of the prompt alone, with a mask",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except layerstack.LayerstackError as exc:
        sys.exit(str(exc))
