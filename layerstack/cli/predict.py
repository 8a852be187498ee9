"""`layerstack predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.files import written_whole
from jobs.tensors import DtypeName, save_tensors
from layerstack.cli.console import AsJson, Url, connect, print_fields, print_json


def predict(
    prompts: Annotated[list[str], typer.Argument(help="One prompt or a few, each in quotes.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write a .safetensors file.")] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="Of the rows; default the encoder's.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Encode a few prompts at once."""
    if output is not None and not output.absolute().parent.is_dir():  # told before anything is computed
        raise typer.BadParameter(f"there is no folder {output.absolute().parent}", param_hint="--output")
    with connect(url) as client:
        answer = client.predict(prompts, dtype=dtype)
    summary: dict[str, Any] = {
        "prompt_embeds": list(answer.prompt_embeds.shape),
        "text_ids": list(answer.text_ids.shape),
        "dtype": answer.prompt_embeds.dtype.name,
        "num_tokens": answer.num_tokens,
        "truncated": answer.truncated,
        "fingerprint": answer.fingerprint,
    }
    if output is not None:
        tensors = {"prompt_embeds": answer.prompt_embeds, "text_ids": answer.text_ids}
        with written_whole(output) as file:
            file.write(save_tensors(tensors, {"fingerprint": answer.fingerprint}))
        summary["output"] = str(output)
    if as_json:
        print_json(summary)
    else:
        print_fields(summary)
