"""Media types as headers write them."""

from __future__ import annotations


def essence(header: str | None) -> str:
    """Return `type/subtype` of a media type, without parameters and in lower case; empty if there is none."""
    return (header or "").partition(";")[0].strip().lower()
