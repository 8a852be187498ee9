"""Options that name an encoder, of all commands that load one."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

# As the encoder has them, which takes seconds to import; tests compare the two.
PresetName = Literal["flux2-dev", "flux2-dev-modular", "flux2-klein-4b", "flux2-klein-9b"]
AttentionName = Literal["auto", "varlen", "sdpa"]

ModelOrDemo = Annotated[
    str | None, typer.Option(help="Folder or hub id of the model; default LAYERSTACK_MODEL, else the demo encoder.")
]
Preset = Annotated[PresetName | None, typer.Option(help="Encoder preset; default LAYERSTACK_PRESET or flux2-dev.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Subfolder = Annotated[str | None, typer.Option(help="Where in the folder or repository the model is.")]
Device = Annotated[str | None, typer.Option(help="Torch device; default CUDA if there is one.")]
Attention = Annotated[AttentionName | None, typer.Option(help="Kernel; default LAYERSTACK_ATTENTION or auto.")]

DEMO_WARNING = "this is the demo encoder: its weights are RANDOM, its embeddings mean nothing; --model names another"
