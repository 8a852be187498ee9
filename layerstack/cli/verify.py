"""`layerstack verify`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.table import Table

from jobs.records import EncoderInfo
from jobs.settings import Settings, load_settings
from layerstack.address import URL_VARIABLE
from layerstack.cli.console import AsJson, ExitCode, chosen, connect, out, print_json, progress, say
from layerstack.cli.encoderoptions import Device, Revision, Subfolder
from layerstack.client import Client
from layerstack.errors import OfflineError
from layerstack.mounted import mounted_model
from layerstack.verification import PROMPTS, Comparison

if TYPE_CHECKING:
    from layerstack.localencoder import LocalEncoder

_AT_A_TIME = 4


def verify(
    url: Annotated[str | None, typer.Argument(envvar=URL_VARIABLE, help="The server; default this machine's.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of the model it should have; default LAYERSTACK_MODEL.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts: .txt, .jsonl, .csv or .parquet; default a few of its own.")
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Compare a server's embeddings with those that this machine computes; the exit code is 4 if they differ."""
    settings = load_settings(**chosen(model_revision=revision, model_subfolder=subfolder, device=device))
    named = model or mounted_model(settings) or settings.model
    if named is None:
        raise typer.BadParameter("name the model that the server should have", param_hint="'--model'")
    found = _compared(url, settings.model_copy(update={"model": named}), prompts)
    if as_json:
        print_json(found.comparison.summary() | {"dtype": found.dtype, "fingerprints": found.fingerprints})
    else:
        _show(found)
    if found.comparison.differences:
        raise typer.Exit(ExitCode.ANSWER_IS_NO)


class _Found(NamedTuple):
    """What was compared, in which dtype, and the fingerprints here and there; of several there, the first other one."""

    comparison: Comparison
    dtype: str
    fingerprints: dict[str, str]


def _compared(url: str | None, settings: Settings, prompts: Path | None) -> _Found:
    try:
        # What it needs comes with the extras 'api' and 'worker', which a client does without.
        from layerstack.localencoder import LocalEncoder, check_prompts, read_prompts  # noqa: PLC0415

        if prompts is not None:
            check_prompts(prompts, settings)
        with connect(url) as client:
            there = client.encoder()
            say(f"loading {settings.model}")
            encoder = LocalEncoder(settings.model_copy(update={"preset": there.preset, "dtype": there.dtype}))
            texts = PROMPTS if prompts is None else [each.prompt for each in read_prompts(prompts, settings)]
            return _compare(client, there, encoder, texts)
    except ModuleNotFoundError as exc:
        raise OfflineError(f"{exc}; `layerstack verify` needs: pip install 'layerstack[api,worker]'") from exc


def _compare(client: Client, there: EncoderInfo, encoder: LocalEncoder, texts: Sequence[str]) -> _Found:
    here, fingerprint = encoder.info, there.fingerprint
    comparison = Comparison(here.layers, here.dtype, encoder.token)
    comparison.expect("layers", here.layers, there.layers)
    with progress("prompts") as bar:
        task = bar.add_task("comparing", total=len(texts))
        for some in _cut(texts):
            answer = client.predict(some)
            comparison.add(some, encoder.dense(some), (answer.prompt_embeds, answer.text_ids))
            comparison.expect("fingerprint", here.fingerprint, answer.fingerprint)  # workers may have other models
            fingerprint = answer.fingerprint if fingerprint == here.fingerprint else fingerprint
            bar.advance(task, len(some))
    return _Found(comparison, there.dtype, {"here": here.fingerprint, "there": fingerprint})


def _show(found: _Found) -> None:
    comparison, fingerprints = found.comparison, found.fingerprints
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
        out.print(f"the same, of {len(comparison.prompts)} prompts in {found.dtype}", style="green", highlight=False)
    for difference in comparison.differences:
        out.print(difference, style="red", highlight=False, markup=False, soft_wrap=True)


def _cut(prompts: Sequence[str]) -> Iterator[list[str]]:
    for begin in range(0, len(prompts), _AT_A_TIME):
        yield list(prompts[begin : begin + _AT_A_TIME])
