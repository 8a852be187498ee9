"""`layerstack encode`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from pydantic import ValidationError
from rich.progress import TaskID

from jobs.records import MAX_CHUNK_TOKENS, JobOptions
from jobs.settings import DEMO_MODEL, load_settings
from layerstack.cli.console import AsJson, ExitCode, chosen, out, print_json, progress, say
from layerstack.errors import OfflineError
from layerstack.mounted import model_to_serve

if TYPE_CHECKING:
    from layerstack.offline import Outcome

_LOGGERS = ("encoder", "jobs", "worker")


def encode(
    file: Annotated[Path, typer.Argument(help="Prompts: .txt, one a line, or .jsonl, .csv, .parquet; also .gz, .zst.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of the model; default LAYERSTACK_MODEL, else the demo encoder.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Encoder preset; default LAYERSTACK_PRESET or flux2-dev.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Where in the folder or repository the model is.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device; default CUDA if there is one.")] = None,
    encoder_dtype: Annotated[
        str | None, typer.Option(help="What it computes in: bfloat16 (default on CUDA), float16 or float32.")
    ] = None,
    attention: Annotated[str | None, typer.Option(help="auto, varlen or sdpa.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the stored rows: bfloat16, float16 or float32; default the encoder's.")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="own_rows (small, default) or dense.")] = None,
    compression: Annotated[str | None, typer.Option(help="none (default) or zstd.")] = None,
    chunk_rows: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, help="Prompts in a part, at most; default LAYERSTACK_CHUNK_ROWS."),
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_CHUNK_TOKENS, help="Tokens in a part, about; default LAYERSTACK_CHUNK_TOKENS."),
    ] = None,
    on_error: Annotated[
        str | None, typer.Option(help="continue (default) notes a prompt that fails; fail ends with it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Encode a prompt file on this machine, without a server. Interrupted, the same command goes on."""
    options = _options(
        dtype=dtype,
        layout=layout,
        compression=compression,
        chunk_rows=chunk_rows,
        chunk_tokens=chunk_tokens,
        on_error=on_error,
    )
    given = chosen(
        preset=preset,
        model_revision=revision,
        model_subfolder=subfolder,
        device=device,
        dtype=encoder_dtype,
        attention=attention,
    )
    settings = load_settings(**given)
    settings = settings.model_copy(update={"model": model or model_to_serve(settings)})
    try:
        # What it needs comes with the extras 'api' and 'worker', which a client does without.
        from layerstack.offline import GO_ON, encode_file  # noqa: PLC0415

        with _Shown(output) as shown, _logs_shown():
            outcome = encode_file(file, output, settings=settings, options=options, watcher=shown)
    except ModuleNotFoundError as exc:
        raise OfflineError(f"{exc}; `layerstack encode` needs: pip install 'layerstack[api,worker]'") from exc
    except KeyboardInterrupt:
        say(f"stopped; {GO_ON}", "yellow")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    _tell(outcome, as_json=as_json)


def _tell(outcome: Outcome, *, as_json: bool) -> None:
    manifest, folder = outcome.manifest, str(outcome.folder)
    if not outcome.parts_written:
        say("all of it was there already")
    if manifest.failed:
        say(f"{manifest.failed} prompts failed; the first: {manifest.errors[0].error}", "yellow")
    if as_json:
        totals = manifest.model_dump(mode="json", exclude={"version", "parts", "errors"})
        counts = {"parts": len(manifest.parts), "parts_written": outcome.parts_written}
        print_json({"folder": folder, **totals, **counts})
        return
    out.print(folder, soft_wrap=True, highlight=False, markup=False)
    say(
        f"{manifest.rows} rows in {len(manifest.parts)} parts, {manifest.bytes / 1e6:,.1f} MB, {manifest.truncated} "
        f"truncated, fingerprint {manifest.fingerprint}"
    )
    say(f"layerstack.read({folder!r}) opens them")


def _options(**given: Any) -> JobOptions:  # noqa: ANN401 - what pydantic validates
    try:
        return JobOptions(**chosen(**given))
    except ValidationError as exc:
        error = exc.errors()[0]
        name = str(error["loc"][0]).replace("_", "-")
        raise typer.BadParameter(f"{error['msg']}; got {error['input']!r}", param_hint=f"'--{name}'") from exc


class _Shown:
    """Shows how far the work is: first a bar for the prompts, then one for the parts that are checked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bar = progress("prompts")
        self._task: TaskID | None = None
        self._is_checking = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._bar.stop()

    def loading(self, model: str) -> None:
        if model == DEMO_MODEL:
            say("no --model: this is the demo encoder, its weights are RANDOM, its embeddings mean nothing", "yellow")
        say(f"loading {model}")

    def encoding(self, done: int, total: int) -> None:
        if self._is_checking or self._task is None:
            say(f"encoding {total} prompts into {self._folder}" + (f", {done} of them are there" if done else ""))
            self._begin("prompts", "encoding", done, total)
            self._is_checking = False
        self._show(done)

    def checking(self, done: int, total: int) -> None:
        if not self._is_checking:
            self._begin("parts", "checking", done, total)
            self._is_checking = True
        self._show(done)

    def _begin(self, unit: str, what: str, done: int, total: int) -> None:
        self._bar.stop()
        self._bar = progress(unit)
        self._bar.start()
        self._task = self._bar.add_task(what, total=total, completed=done)

    def _show(self, done: int) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=done)


class _Said(logging.Handler):
    """Tells what other rooms warn of in one line; tracebacks are for the log of a server."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), "yellow")


@contextmanager
def _logs_shown() -> Iterator[None]:
    handler = _Said(logging.WARNING)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
