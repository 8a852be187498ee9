"""`layerstack encode`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer
from rich.progress import TaskID

from jobs.records import MAX_CHUNK_TOKENS, Compression, JobOptions, Layout, OnError
from jobs.settings import DEMO_MODEL, Settings, load_settings
from jobs.tensors import DtypeName
from layerstack.cli.console import AsJson, ExitCode, chosen, out, print_json, progress, say
from layerstack.cli.encoderoptions import (
    DEMO_WARNING,
    Attention,
    Device,
    ModelOrDemo,
    Preset,
    Revision,
    Subfolder,
)
from layerstack.errors import OfflineError
from layerstack.mounted import model_to_serve
from layerstack.sizes import count_text, size_text

if TYPE_CHECKING:
    from layerstack.offline import Outcome

_LOGGERS = ("encoder", "jobs", "worker")


def encode(
    file: Annotated[Path, typer.Argument(help="Prompts: .txt, one a line, or .jsonl, .csv, .parquet; also .gz, .zst.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results.")],
    model: ModelOrDemo = None,
    preset: Preset = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    device: Device = None,
    encoder_dtype: Annotated[DtypeName | None, typer.Option(help="What it computes in; default by device.")] = None,
    attention: Attention = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="Of the stored rows; default the encoder's.")] = None,
    layout: Annotated[Layout | None, typer.Option(help="own_rows is small, and the default.")] = None,
    compression: Annotated[Compression | None, typer.Option(help="Default none.")] = None,
    chunk_rows: Annotated[int | None, typer.Option(min=1, max=100_000, help="Prompts in a part, at most.")] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(min=1, max=MAX_CHUNK_TOKENS, help="Rows stored in a part, at most, as estimated.")
    ] = None,
    on_error: Annotated[OnError | None, typer.Option(help="Of a prompt: note it (default), or end with it.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Read all parts again, and do damaged ones anew.")] = False,
    as_json: AsJson = False,
) -> None:
    """Encode a prompt file on this machine, without a server. Interrupted, the same command goes on."""
    stored = {"dtype": dtype, "layout": layout, "compression": compression, "on_error": on_error}
    options = JobOptions(**chosen(**stored, chunk_rows=chunk_rows, chunk_tokens=chunk_tokens))
    named = {"preset": preset, "model_revision": revision, "model_subfolder": subfolder}
    settings = load_settings(**chosen(**named, device=device, dtype=encoder_dtype, attention=attention))
    settings = settings.model_copy(update={"model": model or model_to_serve(settings)})
    _tell(_encoded(file, output, settings, options, check=check), check=check, as_json=as_json)


def _encoded(file: Path, output: Path, settings: Settings, options: JobOptions, *, check: bool) -> Outcome:
    try:
        # What it needs comes with the extras 'api' and 'worker', which a client does without.
        from layerstack.offline import GO_ON, encode_file  # noqa: PLC0415

        with _Shown(output) as shown, _logs_shown():
            return encode_file(file, output, settings=settings, options=options, watcher=shown, read_again=check)
    except ModuleNotFoundError as exc:
        raise OfflineError(f"{exc}; `layerstack encode` needs: pip install 'layerstack[api,worker]'") from exc
    except KeyboardInterrupt:
        say(f"stopped; {GO_ON}", "yellow")
        raise typer.Exit(ExitCode.INTERRUPTED) from None


def _tell(outcome: Outcome, *, check: bool, as_json: bool) -> None:
    manifest, folder, written = outcome.manifest, str(outcome.folder), outcome.parts_written
    if not written:
        say("all of it was there already" + (", and each part is what the manifest says" if check else ""))
    if manifest.failed:
        say(f"{count_text(manifest.failed, 'prompt')} failed; the first: {manifest.errors[0].error}", "yellow")
    if as_json:
        totals = manifest.model_dump(mode="json", exclude={"version", "parts", "errors"})
        print_json({"folder": folder, **totals, "parts": len(manifest.parts), "parts_written": written})
        return
    out.print(folder, soft_wrap=True, highlight=False, markup=False)
    now = f" ({written} of them done now)" if 0 < written < len(manifest.parts) else ""
    say(
        f"{count_text(manifest.rows, 'row')} in {count_text(len(manifest.parts), 'part')}{now}, "
        f"{size_text(manifest.bytes)}, {manifest.truncated} truncated, fingerprint {manifest.fingerprint}"
    )
    say(f"layerstack.read({folder!r}) opens them")


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
            say(DEMO_WARNING, "yellow")
        say(f"loading {model}")

    def encoding(self, done: int, total: int) -> None:
        if self._is_checking or self._task is None:
            there = f", {done} of which are there" if done else ""
            say(f"encoding {count_text(total, 'prompt')} into {self._folder}{there}")
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
