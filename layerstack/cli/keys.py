"""`layerstack keys`."""

from __future__ import annotations

import hashlib
import secrets
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError

from jobs.settings import ApiKeys
from layerstack.address import KEY_VARIABLE
from layerstack.cli.console import AsJson, out, print_json, say

keys_app = typer.Typer(no_args_is_help=True, help="Keys of callers, for a server that asks for them.")


@keys_app.command()
def new(
    name: Annotated[str, typer.Argument(help="Who the key is for; jobs made with it belong to this name.")],
    as_json: AsJson = False,
) -> None:
    """Make a key, and the entry with which a server knows it. The key is shown this once and kept nowhere."""
    key = f"ls_{secrets.token_urlsafe(32)}"
    entry = f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"
    try:
        TypeAdapter(ApiKeys).validate_python(entry)
    except ValidationError as exc:
        raise typer.BadParameter(f"{name!r} is not a name of up to 64 of A-Z a-z 0-9 . _ -", param_hint="NAME") from exc
    if as_json:
        print_json({"name": name, "key": key, "entry": entry})
        return
    out.print(f"key    {key}\nentry  {entry}", highlight=False, soft_wrap=True)
    say(f"add the entry to LAYERSTACK_API_KEYS of the server; the caller sets {KEY_VARIABLE} to the key")
