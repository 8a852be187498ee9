"""A plain port of the service that layerstack takes the place of: one file, the model in the server, answers in JSON.

    python -m benchmarks.plain_service DIR [--port 8000]

Here to be compared with; `benchmarks/http.py` starts it. `DIR` is a checkpoint as `encoder.tiny` writes it. As usual in
such services, diffusers' own function runs on all 40 layers with padding to 512 tokens, one request at a time under a
lock, in FastAPI's threads, and tensors become lists with `tolist()`. Many return the lists to FastAPI, which looks at
each number before it writes it; this one makes the JSON response itself, which is faster.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

import torch
import uvicorn
from diffusers import Flux2Pipeline
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from transformers import AutoTokenizer, Mistral3ForConditionalGeneration
from transformers.utils.logging import disable_progress_bar


class PredictRequest(BaseModel):
    """The body of POST /predict."""

    prompt: str | list[str]


def create_app(checkpoint: Path, device: str, dtype: torch.dtype) -> FastAPI:
    """Load the model, and build the application around it."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")
    model = Mistral3ForConditionalGeneration.from_pretrained(checkpoint / "text_encoder", dtype=dtype).to(device).eval()
    lock = threading.Lock()
    app = FastAPI()

    @app.get("/ready")
    def ready() -> None:
        """Answer: the model is loaded before the server listens."""

    @app.post("/predict")
    def predict(request: PredictRequest) -> JSONResponse:
        """Return the text conditioning of the prompts."""
        with lock, torch.no_grad():
            started = time.perf_counter()
            prompt_embeds = Flux2Pipeline._get_mistral_3_small_prompt_embeds(model, tokenizer, request.prompt)
            text_ids = Flux2Pipeline._prepare_text_ids(prompt_embeds)
            prompt_embeds, text_ids = prompt_embeds.cpu(), text_ids.cpu()
            time_ms = (time.perf_counter() - started) * 1e3
        return answer(prompt_embeds, text_ids, time_ms)

    return app


def answer(prompt_embeds: torch.Tensor, text_ids: torch.Tensor, time_ms: float) -> JSONResponse:
    """Write the answer.

    Args:
        prompt_embeds: `[B, L, D]`.
        text_ids: `[B, L, 4]`.
        time_ms: milliseconds that encoding took.
    """
    return JSONResponse(
        {
            "prompt_embeds": prompt_embeds.tolist(),
            "text_ids": text_ids.tolist(),
            "shapes": {"prompt_embeds": list(prompt_embeds.shape), "text_ids": list(text_ids.shape)},
            "time_ms": time_ms,
        }
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plain_service", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("checkpoint", type=Path, metavar="DIR")
    parser.add_argument("--port", type=int, default=8000, help="on loopback (default 8000)")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument("--dtype", default="float32", help="default float32")
    args = parser.parse_args()
    disable_progress_bar()
    app = create_app(args.checkpoint, args.device, getattr(torch, args.dtype))
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
