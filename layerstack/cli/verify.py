"""`layerstack verify`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from jobs.settings import load_settings
from layerstack.address import URL_VARIABLE
from layerstack.cli.console import AsJson, ExitCode, chosen, out, print_json, progress, say
from layerstack.client import Client
from layerstack.errors import OfflineError
from layerstack.verification import PROMPTS, Comparison

_AT_A_TIME = 4


def verify(
    url: Annotated[str | None, typer.Argument(envvar=URL_VARIABLE, help="The server; default this machine's.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of the model it should have; default LAYERSTACK_MODEL.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts: .txt, .jsonl, .csv or .parquet; default a few of its own.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Where in the folder or repository the model is.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device; default CUDA if there is one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a server's embeddings with those that this machine computes; the exit code is 4 if they differ."""
    given = chosen(model=model, model_revision=revision, model_subfolder=subfolder, device=device)
    settings = load_settings(**given)
    if settings.model is None:
        raise typer.BadParameter("name the model that the server should have", param_hint="'--model'")
    try:
        # What it needs comes with the extras 'api' and 'worker', which a client does without.
        from layerstack.offline import LocalEncoder, read_prompts  # noqa: PLC0415

        texts = list(PROMPTS if prompts is None else (each.prompt for each in read_prompts(prompts, settings)))
        if not texts:
            raise typer.BadParameter(f"{prompts}: there is no prompt in it", param_hint="'--prompts'")
        with Client(url) as client, progress("prompts") as bar:
            there = client.encoder()
            say(f"loading {settings.model}")
            as_there = settings.model_copy(update={"preset": there.preset, "dtype": there.dtype})
            encoder = LocalEncoder(as_there)
            comparison = Comparison(encoder.info.layers, encoder.info.dtype, encoder.token)
            comparison.expect("layers", encoder.info.layers, there.layers)
            task = bar.add_task("comparing", total=len(texts))
            for some in _cut(texts):
                answer = client.predict(some)
                comparison.add(some, encoder.dense(some), (answer.prompt_embeds, answer.text_ids))
                bar.advance(task, len(some))
            comparison.expect("fingerprint", encoder.info.fingerprint, answer.fingerprint)
    except ModuleNotFoundError as exc:
        raise OfflineError(f"{exc}; `layerstack verify` needs: pip install 'layerstack[api,worker]'") from exc
    fingerprints = {"here": encoder.info.fingerprint, "there": answer.fingerprint}
    if as_json:
        print_json(comparison.summary() | {"dtype": there.dtype, "fingerprints": fingerprints})
    else:
        _show(comparison, there.dtype, fingerprints)
    if comparison.differences:
        raise typer.Exit(ExitCode.ANSWER_IS_NO)


def _show(comparison: Comparison, dtype: str, fingerprints: dict[str, str]) -> None:
    table = Table("layer", "abs error", "row error", "tolerance", "prompt", "row", "token", "wrong rows", box=None)
    for layer in comparison.layers:
        table.add_row(
            str(layer.layer),
            f"{layer.absolute:.2e}",
            f"{layer.relative:.2e}",
            f"{comparison.tolerance:g}",
            str(layer.prompt),
            str(layer.row),
            comparison.token(layer),
            str(layer.wrong_rows),
            style="red" if layer.wrong_rows else None,
        )
    out.print(table)
    out.print(f"fingerprint {fingerprints['there']} there, {fingerprints['here']} here", highlight=False)
    if not comparison.differences:
        out.print(f"the same, of {len(comparison.prompts)} prompts in {dtype}", style="green", highlight=False)
    for difference in comparison.differences:
        out.print(difference, style="red", highlight=False, markup=False, soft_wrap=True)


def _cut(prompts: Sequence[str]) -> Iterator[list[str]]:
    for begin in range(0, len(prompts), _AT_A_TIME):
        yield list(prompts[begin : begin + _AT_A_TIME])
