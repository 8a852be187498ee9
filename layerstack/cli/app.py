"""The commands, and what their errors say to the person who reads them."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import httpx
import typer
from typer.core import TyperGroup

import layerstack
from jobs.errors import JobsError
from layerstack.address import KEY_VARIABLE
from layerstack.cli import console
from layerstack.cli.bench import bench
from layerstack.cli.console import ExitCode
from layerstack.cli.encode import encode
from layerstack.cli.export import export
from layerstack.cli.inspect import inspect
from layerstack.cli.jobs import jobs_app
from layerstack.cli.keys import keys_app
from layerstack.cli.predict import predict
from layerstack.cli.up import up
from layerstack.cli.verify import verify
from layerstack.errors import AddressError, LayerstackError, ServerError, ServerUnreachableError


class _Commands(TyperGroup):
    """Commands that end with 130 at Ctrl-C, as in a shell."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - typer's own copy of click, and what any command returns
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(ExitCode.INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    help="Prompts in, FLUX.2 text conditioning out.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no server answers, 4 the answer is no, 130 Ctrl-C.",
    pretty_exceptions_enable=False,
)
for command in (up, encode, predict, inspect, export, verify, bench):
    app.command()(command)
app.add_typer(jobs_app, name="jobs")
app.add_typer(keys_app, name="keys")

_ADVICE = {
    "unauthorized": f"set {KEY_VARIABLE} to a key that whoever runs the server gave you",
    "job-not-found": "`layerstack jobs list` shows those that there are",
    "not-there-yet": "`layerstack jobs watch` shows how far it is",
    "no-worker": "it may still be loading its model",
}
"""What to do next, by the kind of a problem."""
_START_ONE = "start a server with `layerstack up`, or name one with --url or LAYERSTACK_URL"


@app.command()
def version() -> None:
    """Print the version."""
    console.out.print(layerstack.__version__)


def main() -> None:
    """Run the command line, turning our errors into a line for the person who reads it."""
    try:
        app()
    except AddressError as exc:
        _fail(str(exc), ExitCode.USAGE)
    except ServerUnreachableError as exc:
        _fail(f"{exc}; {_START_ONE}", ExitCode.NO_SERVER)
    except ServerError as exc:
        advice = f"; {_ADVICE[exc.kind]}" if exc.kind in _ADVICE else ""
        is_away = exc.status == httpx.codes.SERVICE_UNAVAILABLE
        _fail(f"{exc}{advice}", ExitCode.NO_SERVER if is_away else ExitCode.FAILED)
    except (LayerstackError, JobsError) as exc:
        _fail(str(exc))
    except OSError as exc:
        _fail(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc))


def _fail(message: str, code: ExitCode = ExitCode.FAILED) -> NoReturn:
    console.say(f"error: {message}", "red")
    sys.exit(code)
