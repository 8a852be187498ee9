"""`layerstack up`."""

from __future__ import annotations

from typing import Annotated

import typer

import layerstack
from jobs.settings import DEMO_MODEL, load_settings
from layerstack.cli.console import say
from layerstack.errors import LocalStackError
from layerstack.mounted import model_to_serve


def up(
    port: Annotated[int | None, typer.Option(help="Port of the API; default LAYERSTACK_PORT or 7860.")] = None,
    storage: Annotated[str | None, typer.Option(help="Folder of the jobs; default LAYERSTACK_STORAGE.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of the model; default LAYERSTACK_MODEL, else the demo encoder.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Encoder preset; default LAYERSTACK_PRESET or flux2-dev.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device; default CUDA if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    attention: Annotated[str | None, typer.Option(help="auto, varlen or sdpa.")] = None,
) -> None:
    """Start everything on this machine: a broker, a worker and the API. Ctrl-C stops it all."""
    try:
        # What it needs comes with the extras 'api' and 'worker', which a client does without.
        from layerstack.local import LocalStack, StopRequest  # noqa: PLC0415
    except ImportError as exc:
        raise LocalStackError(f"{exc}; `layerstack up` needs: pip install 'layerstack[api,worker]'") from exc
    given = {
        "port": port,
        "storage": storage,
        "model": model,
        "preset": preset,
        "device": device,
        "dtype": dtype,
        "attention": attention,
    }
    settings = load_settings(**{name: value for name, value in given.items() if value is not None})
    settings = settings.model_copy(update={"model": model or model_to_serve(settings)})
    stop = StopRequest()
    with LocalStack(settings, say) as stack:
        say(f"layerstack {layerstack.__version__} on {stack.url}, docs at {stack.url}/docs")
        say(f"jobs are kept in {stack.storage}; the model is {settings.model}")
        if settings.model == DEMO_MODEL:
            say("no --model: this is the demo encoder, its weights are RANDOM, its embeddings mean nothing", "yellow")
        stack.run(stop)
        say("stopping")
    say("stopped")
