"""The commands, and what their errors say to the person who reads them."""

from __future__ import annotations

import sys
from typing import NoReturn

import httpx
import typer

import layerstack
from jobs.errors import JobsError
from layerstack.address import KEY_VARIABLE
from layerstack.cli import console
from layerstack.cli.console import ExitCode
from layerstack.cli.jobs import jobs_app
from layerstack.cli.keys import keys_app
from layerstack.cli.predict import predict
from layerstack.cli.up import up
from layerstack.errors import LayerstackError, ServerError, ServerUnreachableError

app = typer.Typer(
    no_args_is_help=True,
    help="Prompts in, FLUX.2 text conditioning out.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no server answers, 4 the answer is no, 130 Ctrl-C.",
    pretty_exceptions_enable=False,
)
for command in (up, predict):
    app.command()(command)
app.add_typer(jobs_app, name="jobs")
app.add_typer(keys_app, name="keys")

_AFTER_401 = f"set {KEY_VARIABLE} to a key that whoever runs the server gave you"
_START_ONE = "start a server with `layerstack up`, or name one with --url or LAYERSTACK_URL"


@app.command()
def version() -> None:
    """Print the version."""
    console.out.print(layerstack.__version__)


def main() -> None:
    """Run the command line, turning our errors into a line for the person who reads it."""
    try:
        app()
    except ServerUnreachableError as exc:
        _fail(f"{exc}; {_START_ONE}", ExitCode.NO_SERVER)
    except ServerError as exc:
        if exc.status == httpx.codes.UNAUTHORIZED:
            _fail(f"{exc}; {_AFTER_401}")
        _fail(str(exc), ExitCode.NO_SERVER if exc.status == httpx.codes.SERVICE_UNAVAILABLE else ExitCode.FAILED)
    except (LayerstackError, JobsError) as exc:
        _fail(str(exc))
    except OSError as exc:
        _fail(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc))


def _fail(message: str, code: ExitCode = ExitCode.FAILED) -> NoReturn:
    console.say(f"error: {message}", "red")
    sys.exit(code)
