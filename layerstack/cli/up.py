"""`layerstack up`."""

from __future__ import annotations

from typing import Annotated

import typer

import layerstack
from jobs.settings import DEMO_MODEL, load_settings
from jobs.tensors import DtypeName
from layerstack.cli.console import say
from layerstack.cli.encoderoptions import DEMO_WARNING, Attention, Device, ModelOrDemo, Preset
from layerstack.errors import LocalStackError
from layerstack.mounted import model_to_serve


def up(
    port: Annotated[int | None, typer.Option(help="Port of the API; default LAYERSTACK_PORT or 7860.")] = None,
    storage: Annotated[str | None, typer.Option(help="Folder of the jobs; default LAYERSTACK_STORAGE.")] = None,
    model: ModelOrDemo = None,
    preset: Preset = None,
    device: Device = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="What it computes in; default by device.")] = None,
    attention: Attention = None,
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
            say(DEMO_WARNING, "yellow")
        stack.run(stop)
        say("stopping")
    say("stopped")
