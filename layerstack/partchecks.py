"""What is wrong with a part, in words for whoever opened it: whichever way it is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from jobs.errors import JobsError
from jobs.parts import PART_SCHEMA, PartHeader, damage_told
from layerstack.errors import ReadError

_CONSTANTS = {"prefix_rows", "pad_row"}

SMALL_COLUMNS = ("index", "id", "prompt", "num_tokens", "truncated", "error")
"""All but `prompt_embeds`, which is nearly all of a part, and `text_ids`."""


@contextmanager
def read_errors(name: str) -> Iterator[None]:
    """Turn what goes wrong with the part `name` into a `ReadError`."""
    try:
        with damage_told(name):
            yield
    except JobsError as exc:  # damage, or the storage fails
        raise ReadError(str(exc)) from exc
    except OSError as exc:
        raise ReadError(f"{name} cannot be read: {exc.strerror}") from exc


def check_together(name: str, header: PartHeader, first_name: str, first: PartHeader) -> None:
    """Find out whether a part is of the same encoder and options as the first one.

    Raises:
        ReadError: it is not.
    """
    if header.fingerprint != first.fingerprint:
        raise ReadError(
            f"{name} and {first_name} do not belong together: they were made by different encoders or options "
            f"(fingerprints {header.fingerprint} and {first.fingerprint})"
        )
    if header != first:
        raise ReadError(
            f"{name} and {first_name} do not belong together, though one encoder made both: "
            f"{_differences(header, first)}"
        )


def check_columns(name: str, found: Iterable[str], needed: Iterable[str] = PART_SCHEMA.names) -> None:
    """Find out whether a part has the columns that are `needed`.

    Raises:
        ReadError: it has not.
    """
    if lacking := set(needed) - set(found):
        raise ReadError(f"{name} is no part of layerstack: it lacks the columns {sorted(lacking)}")


def _differences(header: PartHeader, first: PartHeader) -> str:
    """Say in which fields two headers differ. Those of a dtype have constants that cannot be the same, and are long."""
    names = [name for name in PartHeader.model_fields if getattr(header, name) != getattr(first, name)]
    shown = [
        f"{name} is {getattr(header, name)} and {getattr(first, name)}" for name in names if name not in _CONSTANTS
    ]
    return "; ".join(shown) or f"their {' and '.join(names)} differ"
